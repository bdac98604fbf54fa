"""Parsers of what strangers write: whatever it is, a value or one error of s2q that is short and printable."""

import json
import struct
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from s2q.checkpoint import S2QConfig
from s2q.common.arguments import MAX_PROMPT
from s2q.common.errors import InvalidInputError, S2QError, printable
from s2q.common.foreign_code import check_index
from s2q.common.headers import read_header
from s2q.core.input_path import PARTS, InputPath
from s2q.core.schemes import LinearScheme
from s2q.core.storage import parse_bytes
from s2q.core.tokens import TokenLayout
from s2q.generation.prompts import prompt_list, read_prompts
from s2q.models.hub import parse_hub_id
from s2q.recipes.load import load_recipe
from s2q.recipes.schema import Recipe
from s2q.recipes.strict_yaml import parse_yaml
from s2q.report.video import contact_sheet

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NUMBER = st.integers() | st.floats() | st.sampled_from([2**63, 10**30, -1, 0, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@contextmanager
def one_short_error():
    """Lets an error of s2q pass that is one printable line; other exceptions fail the test."""
    try:
        yield
    except S2QError as error:
        text = str(error)
        assert len(text) <= 4001
        assert text == printable(text)
        assert "\n" not in text


def known_keys(content):
    """JSON objects with some of the keys that are known, so that more than the first check is reached."""
    return st.dictionaries(st.sampled_from(content) | TEXT, JSON, max_size=6)


@QUICK
@given(TEXT | st.text("{}[]:,-?&*!|>'\"%@`#\n \tabc019.~", max_size=60))
def test_any_text_is_yaml_or_one_short_error(text):
    with one_short_error():
        parse_yaml(text, where="x")


PLAIN = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co", "Zl", "Zp"]), max_size=20)
NAMED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), inner),
    max_leaves=12,
)


@QUICK
@given(NAMED)
def test_json_is_yaml_with_the_same_values(content):
    assert repr(parse_yaml(json.dumps(content, ensure_ascii=False), where="x")) == repr(content)


KEYS = (
    "weights.num_bits",
    "weights",
    "activations",
    "distillation.lr",
    "calibration.height",
    "skip",
    "name",
    "clip.weights",
)


@QUICK
@given(st.sampled_from(KEYS) | TEXT, TEXT | JSON.map(lambda value: json.dumps(value)))
def test_any_override_gives_a_recipe_or_one_short_error(key, value):
    with one_short_error():
        assert isinstance(load_recipe("s2q-w4a6", overrides=[f"{key}={value}"]), Recipe)


@QUICK
@given(known_keys(list(Recipe.model_fields)))
def test_any_mapping_is_a_recipe_or_one_short_error(content):
    with one_short_error():
        assert isinstance(load_recipe(content), Recipe)


@QUICK
@given(TEXT | st.from_regex(r"-?[0-9.eE+]{0,8} ?[kKMGT]?i?B?", fullmatch=True) | NUMBER | JSON)
def test_any_size_is_bytes_or_one_short_error(size):
    with one_short_error():
        number = parse_bytes(size, option="memory_budget")
        assert isinstance(number, int)
        assert number >= 0


@QUICK
@given(
    st.binary(max_size=80)
    | TEXT.map(str.encode)
    | st.lists(TEXT, max_size=5).map(lambda lines: "\r\n".join(lines).encode())
)
def test_any_file_is_prompts_or_one_short_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "prompts.txt"
    path.write_bytes(content)
    with one_short_error():
        prompts = read_prompts(path)
        assert prompts == prompt_list("prompts", prompts)
        assert all(prompt == prompt.strip() and not set(prompt) & set("\r\n") for prompt in prompts)
        assert all(prompt.encode() in content for prompt in prompts)


@pytest.mark.parametrize("mark", ["\u202e", "\u2066", "\u200f", "\u200b", "\x1b[31m", "\0", "\x07"])
def test_marks_and_controls_of_a_prompt_are_kept_and_never_printed_raw(tmp_path, mark):
    path = tmp_path / "prompts.txt"
    path.write_text(f"a {mark}cat\na {mark}cat\n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="line 2 repeats the prompt of line 1") as caught:
        read_prompts(path)
    assert str(caught.value) == printable(str(caught.value))
    path.write_text(f"a {mark}cat\n", encoding="utf-8")
    assert read_prompts(path) == [f"a {mark}cat"]


def test_a_line_longer_than_a_prompt_is_refused_with_its_number(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n" + "x" * 2**20 + "\n")
    with pytest.raises(InvalidInputError, match=rf"line 2 has 1048576 characters; expected .* at most {MAX_PROMPT}"):
        read_prompts(path)
    with pytest.raises(InvalidInputError, match="prompt 1 of 1 has 1048576 characters"):
        prompt_list("prompts", ["x" * 2**20])


@QUICK
@given(st.lists(TEXT.filter(str.strip), min_size=1, max_size=2))
def test_any_prompt_labels_a_contact_sheet(prompts):
    frames = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    assert contact_sheet([(prompt, frames) for prompt in prompts]).startswith(b"\x89PNG")


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(-1, 40), st.integers(-1, 40)).map(list) | JSON,
    }
)


@settings(QUICK, max_examples=200)
@given(st.dictionaries(st.sampled_from(["a", "b"]), ENTRY, max_size=2) | JSON, st.integers(0, 40), st.integers(-3, 3))
def test_a_header_that_is_read_is_one_that_safetensors_reads(tmp_path_factory, header, payload, off):
    path = tmp_path_factory.getbasetemp() / "a.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", max(0, len(text) + off)) + text + bytes(payload))
    with one_short_error():
        tensors = read_header(path)
        try:
            with safe_open(path, "pt") as file:
                assert set(file.keys()) == set(tensors)
        except SafetensorError:  # what s2q does not know: dtypes, and objects that stand for lists
            assert any(info.dtype not in ("F32", "BF16", "U8") for info in tensors.values()) or not tensors


CONFIG = (
    "quant_method",
    "format_version",
    "layers",
    "schemes",
    "recipe",
    "compute_dtype",
    "inputs",
    "layer_inputs",
    "tokens",
)


@QUICK
@given(known_keys(CONFIG) | st.builds(dict, layers=known_keys(["a"]), schemes=known_keys(["b"]), compute_dtype=JSON))
def test_any_mapping_is_a_quantization_config_or_one_short_error(content):
    with one_short_error():
        S2QConfig.from_dict(content)


SCHEME = ("num_bits", "granularity", "group_size", "dynamic", "levels", "delta", "weight", "activation")
LAYOUT = ("latents", "patch", "text")


@QUICK
@given(known_keys(SCHEME), known_keys(list(PARTS)), known_keys(LAYOUT))
def test_any_mapping_is_a_scheme_a_path_a_layout_or_one_short_error(scheme, path, layout):
    for read, content in (
        (LinearScheme.from_dict, {"weight": scheme, "activation": scheme}),
        (TokenLayout.from_dict, layout),
    ):
        with one_short_error():
            read(content)
    with one_short_error():
        InputPath.from_dict(path)


ENTRIES = st.dictionaries(TEXT, st.lists(TEXT | JSON, min_size=2, max_size=2), max_size=3)


@QUICK
@given(ENTRIES | known_keys(["_class_name", "vae", "../vae"]))
def test_an_index_names_folders_beside_it_and_libraries_that_are_known_or_is_refused(content):
    from pathlib import Path

    with one_short_error():
        check_index(Path("model_index.json"), content)
        for name, entry in content.items():
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
                assert "/" not in name
                assert name != ".."


@QUICK
@given(TEXT | st.from_regex(r"[\w./@-]{1,30}"))
def test_a_hub_id_has_no_path_in_it(text):
    hub = parse_hub_id(text)
    assert hub is None or (hub.repo.count("/") == 1 and ".." not in hub.repo.split("/"))


@QUICK
@given(st.text(max_size=60))
def test_a_printable_text_has_no_control_characters_and_stays_as_it_is(text):
    shown = printable(text)
    assert printable(shown) == shown
    assert not any(ord(character) < 32 and character != "\n" for character in shown)
    shown.encode()
