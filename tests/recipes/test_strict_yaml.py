import math
import time

import pytest

from s2q.common.errors import InvalidInputError
from s2q.recipes.load import load_recipe
from s2q.recipes.methods import methods
from s2q.recipes.strict_yaml import MAX_BYTES, MAX_DEPTH, parse_yaml


def value_of(text):
    return parse_yaml(f"a: {text}", where="x")["a"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1e3),
        ("1.5e+2", 150.0),
        (".5", 0.5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("0", 0),
        ("-7", -7),
        ("+7", 7),
        ("0.50", 0.5),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("[1, a, [2]]", [1, "a", [2]]),
        ("{b: 1, c: {d: x}}", {"b": 1, "c": {"d": "x"}}),
        ("{}", {}),
    ],
)
def test_values_are_those_of_yaml_1_2(text, value):
    assert value_of(text) == value
    assert type(value_of(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "1:20",
        "1:20:30",
        "190:20:30.15",
        "yes",
        "no",
        "on",
        "off",
        "Yes",
        "y",
        "n",
        "0x10",
        "0o17",
        "0b1",
        "1_000",
        "2026-11-28",
    ]
    + ["=", "1e", "e3", ".", "-", "1.2.3", "tRue", "NaN", "inf", "1 000", "9" * 50],
)
def test_what_yaml_1_1_would_convert_is_a_string(text):
    if text != "-":  # an empty list item
        assert value_of(text) == text
    assert value_of(f"'{text}'") == value_of(f'"{text}"') == text


def test_nan_is_a_number():
    assert math.isnan(value_of(".nan"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "x: line 3: duplicate key 'a', first in line 1; remove one"),
        ("g:\n  a: 1\n  b: 2\n  a: 3\n", r"line 4: duplicate key 'g\.a', first in line 2"),
        ("g: {a: 1, a: 1}\n", r"line 1: duplicate key 'g\.a'"),
        ("- a: 1\n- {b: 1, b: 2}\n", "line 2: duplicate key 'b'"),
        ("a: 1\n'a': 2\n", "line 2: duplicate key 'a'"),
        ("a: 1\nb: {c: {d: [{e: 1, e: 2}]}}\n", r"line 2: duplicate key 'b\.c\.d\.e'"),
        ("a: 010\n", "line 1: '010' has leading zeros; write 10, or quote it"),
        ("a: -007\n", "line 1: '-007' has leading zeros; write -7, or quote it"),
        ("a:\n\tb: 1\n", "line 2, column 1: not valid YAML: a tab, where YAML takes spaces only"),
        ("a: [1,\n\t2]\n", "line 2, column 1: .*a tab"),
        ("a: 1\n b: 2\n", "line 2, column 3: not valid YAML"),
        ("a: 'open\n", "line 2.*not valid YAML"),
        ("a: &x 1\n", "line 1: anchors and aliases"),
        ("a: 1\nb: *x\n", "line 2: anchors and aliases.*quote the text"),
        ("skip: [*.ff]\n", "line 1, column 9: .*anchors and aliases.*quote the text"),
        ("&x a: 1\n", "line 1: anchors and aliases"),
        ("a: !!str 1\n", "line 1: the tag '.*str' is not supported"),
        ("a: !!python/object/apply:os.getcwd []\n", "line 1: the tag '.*os.getcwd' is not supported"),
        ("? [a]\n: 1\n", "line 1: a key must be a name"),
        ("{a: 1}: 2\n", "line 1: a key must be a name"),
        ("a: 1\n---\nb: 2\n", "line 2: a second document"),
        ("a: \x00", "not valid YAML"),
        ("a: " + "[" * (MAX_DEPTH + 1), f"line 1: nested deeper than {MAX_DEPTH} levels"),
        ("a:\n" + "".join(" " * (i + 1) + "b:\n" for i in range(MAX_DEPTH + 1)), "nested deeper"),
        ("a: " + "x" * MAX_BYTES, "longer than 128 KiB"),
    ],
)
def test_what_is_refused_names_the_line(text, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        parse_yaml(text, where="x")
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


BOMB = "\n".join(
    ["b0: &b0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 9)]
)


@pytest.mark.parametrize("key", ["name", "extends", "skip", "weights", "description"])
def test_an_alias_bomb_ends_at_once(tmp_path, key):
    path = tmp_path / "bomb.yaml"
    path.write_text(f"{BOMB}\n{key}: *b8\n")
    started = time.perf_counter()
    with pytest.raises(InvalidInputError, match=r"bomb\.yaml: line 1: anchors and aliases") as caught:
        load_recipe(path)
    assert time.perf_counter() - started < 5
    assert len(str(caught.value)) < 400


def bomb_of_objects(levels):
    value = ["lol"] * 9
    for _ in range(levels):
        value = [value] * 9
    return value


def deep(levels):
    value = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def cyclic():
    value: list = []
    value.append(value)
    return value


@pytest.mark.parametrize("key", ["name", "extends", "skip", "weights", "clip", "calibration"])
@pytest.mark.parametrize("value", [bomb_of_objects(9), deep(5000), cyclic(), "x" * 10**7, 10**5000], ids=lambda _: "")
def test_messages_about_huge_values_are_short(key, value):
    content = {"name": "mine", "weights": {"num_bits": 4}} | {key: value}
    started = time.perf_counter()
    with pytest.raises(InvalidInputError) as caught:
        load_recipe(content)
    assert time.perf_counter() - started < 5
    assert len(str(caught.value)) < 2500


@pytest.mark.parametrize(
    "text", ["[" * 10**5, "{a: " * 20000, "- " * 60000, "? " * 60000, "'" + "\n" * 10**5, "# c\n" * 30000]
)
def test_hostile_files_end_soon(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=r"mine\.yaml: "):
        load_recipe(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights={num_bits: 4, num_bits: 8}", "line 1: duplicate key 'num_bits'"),
        ("calibration.height=1:20", r"calibration\.height='1:20': input should be a valid integer"),
        ("transforms.learn_scale=yes", r"learn_scale='yes': input should be a valid boolean; write true or false"),
        ("weights.num_bits=04", "'04' has leading zeros; write 4"),
        ("distillation.epochs=1e1", r"epochs=10\.0: input should be a valid integer; write 10"),
        ("name=&a x", "anchors and aliases"),
        ("skip=*.ff.*", "anchors and aliases.*quote the text"),
        ("skip=transformer_blocks.0.*", r"expected a list; write \['transformer_blocks\.0\.\*'\]"),
        ("weights=" + "[" * 10**5, "nested deeper"),
        (".".join("a" * 5000) + "=1", "unknown key"),
        ("weights." + ".".join("a" * 5000) + "=1", "unknown key"),
        ("a" * 10**6 + "=1", "unknown key"),
        ("weights.num_bits=" + "9" * 10**6, "longer than"),
        ("weights.num_bits=" + "9" * 5000, "input should be a valid integer"),
        ("rounding.dampening_frac=.nan", "finite number"),
        ("distillation.lr='1e-3'", "lr='1e-3': input should be a valid number"),
        ("weights.num_bits=\t4", "tab"),
    ],
)
def test_overrides_are_as_strict(override, message):
    started = time.perf_counter()
    with pytest.raises(InvalidInputError, match=message) as caught:
        load_recipe("s2q-w4a6", overrides=[override])
    assert time.perf_counter() - started < 5
    assert len(str(caught.value)) < 2500


def test_numbers_without_a_point_are_numbers():
    assert load_recipe("s2q-w4a6", overrides=["distillation.lr=1e-3"]).distillation.lr == 1e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("weights.num_bits=8", "pass a list"),
        (b"weights.num_bits=8", "pass a list"),
        ({"weights.num_bits": 8}, "pass a list"),
        (7, "pass a list"),
        (None, "pass a list"),
        ([("weights.num_bits", 8)], "expected text"),
        ([b"weights.num_bits=8"], "expected text"),
        (["weights.num_bits=8", "weights.num_bits=4"], "'weights.num_bits' is set before it"),
        (["weights.num_bits=8", "weights={num_bits: 4}"], "'weights.num_bits' is set before it"),
        (["weights.num_bits"], "expected key=value"),
        (["weights..num_bits=4"], "expected key=value"),
    ],
)
def test_overrides_are_a_list_of_different_keys(overrides, message):
    with pytest.raises(InvalidInputError, match=message):
        load_recipe("rtn-w4a6", overrides=overrides)


def test_a_group_may_be_set_and_then_changed():
    recipe = load_recipe("rtn-w4a6", overrides=["activations={num_bits: 4}", "activations.num_bits=5"])
    assert recipe.activations.num_bits == 5


@pytest.mark.parametrize("recipe", [None, 7, True, 1.5, b"rtn-w4a6", ["rtn-w4a6"], object()])
def test_a_recipe_is_a_name_a_file_a_mapping_or_a_recipe(recipe):
    with pytest.raises(InvalidInputError, match="recipe: got .*; expected a name, the path of a YAML file"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae: a\nweights: {num_bits: 4}\n", "unknown key 'nmae'; nearest keys are name"),
        ("name: a\nwieghts: {num_bits: 4}\n", "unknown key 'wieghts'; nearest keys are weights"),
        ("name: a\nweights: {num_bit: 4}\n", r"unknown key 'weights\.num_bit'; nearest keys are weights\.num_bits"),
        (
            "name: a\nweights: {num_bits: 4}\nnum_bits: 4\n",
            r"unknown key 'num_bits'; nearest keys are .*weights\.num_bits",
        ),
        ("name: a\nweights: {num_bits: 4, epochs: 3}\n", r"nearest keys are .*distillation\.epochs"),
        (
            "name: a\nweights: {num_bits: 4}\nactivations: none\n",
            r"activations='none': expected a group of keys \(num_bits, .*or null",
        ),
        ("name: a\nweights: 4\n", r"weights=4: expected a group of keys \(num_bits"),
        ("name: a\nweights: {num_bits: 4}\nskip: '*.ff'\n", r"skip='\*\.ff': expected a list; write \['\*\.ff'\]"),
        ("name: a\nweights: {num_bits: 4}\nclip: {weights: 1}\n", "clip.weights=1: input should be a valid boolean"),
        ("name: 4\nweights: {num_bits: 4}\n", "name=4: input should be a valid string"),
        ("weights: {num_bits: 4}\n", "missing key 'name'; add it"),
        ("name: a\nweights: {}\n", r"missing key 'weights\.num_bits'; add it"),
        ("7: a\n", "unknown key '7'"),
        ("extends: s2q-w4a9\nname: a\n", "extends: unknown recipe 's2q-w4a9': s2q has the widths"),
        ("extends: 7\nname: a\n", "extends=7: expected a built-in recipe"),
    ],
)
def test_wrong_keys_and_values_name_the_path_and_the_remedy(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=rf"mine\.yaml: {message}" if "nearest" not in message else message):
        load_recipe(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_skipped(tmp_path, encoding):
    path = tmp_path / "mine.yaml"
    path.write_text("name: é\nweights: {num_bits: 4}\n", encoding=encoding)
    assert load_recipe(path).name == "é"


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: é\nweights: {num_bits: 4}\n", encoding="utf-16")
    with pytest.raises(InvalidInputError, match="cannot be read as UTF-8 text"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["\0.yaml", "a" * 5000 + ".yaml", "\udcff.yaml"])
def test_odd_file_names_are_input_errors(name):
    with pytest.raises(InvalidInputError):
        load_recipe(name)


def test_the_recipes_of_the_package_read_the_same_with_pyyaml():
    from importlib import resources

    import yaml

    for name in methods():
        text = resources.files("s2q.recipes").joinpath("methods", f"{name}.yaml").read_text(encoding="utf-8")
        assert parse_yaml(text, where=name) == yaml.safe_load(text)
