import json

import pytest

from s2q.checkpoint import FORMAT_VERSION, S2QConfig
from s2q.common.errors import InvalidInputError
from s2q.core.input_path import InputPath
from s2q.core.schemes import Delta, LinearScheme
from s2q.core.tokens import TokenLayout
from schemes import activations, scheme

SCHEME = scheme(4, None)
DELTA = LinearScheme(
    weight=SCHEME.weight,
    activation=activations(4, delta=Delta(cube=(2, 2, 2))),
)
PATH = InputPath(scale=True, left=4, right=8, activation_clip=True)


def config(**paths):
    return S2QConfig.from_schemes(
        dict.fromkeys("ab", SCHEME), recipe="mine", compute_dtype="bfloat16", paths=paths
    ).to_dict()


def test_without_inputs_nothing_is_said_of_them():
    content = config()
    assert content["format_version"] == FORMAT_VERSION == 4
    assert not {"inputs", "layer_inputs"} & set(content)
    assert S2QConfig.from_dict(content).layer_paths() == {}


def test_input_paths_survive_json():
    content = config(a=PATH)
    assert content["format_version"] == 4
    again = S2QConfig.from_dict(content)
    assert again.layer_paths() == {"a": PATH}
    assert again.to_dict() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 5}, "format_version=5; this s2q reads versions 1 to 4"),
        ({"format_version": 3, "tokens": {}}, "token layout: got {}; expected a mapping with latents, patch, text"),
        ({"format_version": True}, "format_version=True"),
        ({"format_version": 1}, "unknown key in quantization_config 'inputs'"),
        ({"inputs": None}, "inputs or layer_inputs is missing"),
        ({"inputs": {"t0": {"scales": True}}}, "unknown key of an input path 'scales': nearest names are scale"),
        ({"inputs": {"t0": {"left": 0}}}, "left=0"),
        ({"inputs": {"t0": {"low_rank": 1.5}}}, "low_rank=1.5"),
        ({"inputs": {"t0": {"scale": 1}}}, "scale=1"),
        ({"inputs": {"t0": {"low_rank": 2, "deflates": 0}}}, "deflates=0; expected true or false"),
        ({"inputs": {"t0": {"deflates": False}}}, "deflates=false without low_rank"),
        (
            {"format_version": 2, "inputs": {"t0": {"low_rank": 2, "deflates": False}}},
            "deflates=false in format_version=2; expected 3",
        ),
        ({"layer_inputs": {"c": "t0"}}, "unknown layer in layer_inputs"),
        ({"layer_inputs": {"a": "t1"}}, "unknown input of a"),
    ],
)
def test_what_is_not_valid_is_refused(change, message):
    with pytest.raises(InvalidInputError, match=message):
        S2QConfig.from_dict({**config(a=PATH), **change})


def test_how_tokens_are_made_comes_back():
    tokens = TokenLayout(latents="channels first", patch=(1, 2, 2), text="after")
    schemes = dict.fromkeys("ab", DELTA)
    content = S2QConfig.from_schemes(schemes, recipe="mine", compute_dtype="bfloat16", tokens=tokens).to_dict()
    again = S2QConfig.from_dict(json.loads(json.dumps(content)))
    assert (again.token_layout(), again.layer_schemes(), again.layer_paths()) == (tokens, schemes, {})
    assert S2QConfig.from_dict(config(a=PATH)).token_layout() is None
    for change, message in (
        ({"tokens": {**content["tokens"], "text": "left"}}, "unknown text of a token layout 'left'"),
        ({"tokens": {**content["tokens"], "grid": 1}}, "unknown key of a token layout 'grid'"),
        ({"tokens": None}, "token layout: got None"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            S2QConfig.from_dict({**content, **change})


@pytest.mark.parametrize(("scheme", "path"), [("delta", {}), ("plain", {"estimator": True, "estimator_frames": 3})])
def test_layers_that_have_to_know_where_tokens_lie_are_refused_without(scheme, path):
    paths = {"a": InputPath(**path)} if path else {}
    schemes = {"a": {"delta": DELTA, "plain": SCHEME}[scheme]}
    with pytest.raises(InvalidInputError, match="tokens is missing"):
        S2QConfig.from_schemes(schemes, recipe="mine", compute_dtype="bfloat16", paths=paths)


def test_an_estimator_is_in_a_layout_only_if_there_is_one():
    assert "estimator" not in PATH.to_dict()
    path = InputPath(estimator=True, estimator_frames=3)
    assert InputPath.from_dict(path.to_dict()) == path
    assert not path.empty
    shapes = {"estimator_input": (32,), "estimator_output": (16,), "estimator_frames": (3,)}
    assert path.shapes(32, 16) == shapes
    assert path.num_bytes(32, 16) == 4 * (32 + 16 + 3)
    assert InputPath(estimator=True).shapes(32, 16).keys() == {"estimator_input", "estimator_output"}
    for fields, message in (({"estimator_frames": 3}, "without estimator"), ({"estimator": 1}, "estimator=1")):
        with pytest.raises(InvalidInputError, match=message):
            InputPath(**fields)


def test_an_input_path_has_these_shapes_and_bytes():
    assert PATH.shapes(32, 16) == {
        "transform_scale": (32,),
        "transform_left": (4, 4),
        "transform_right": (8, 8),
        "activation_clip": (1,),
    }
    assert PATH.num_bytes(32, 16) == 2 * (32 + 16 + 64) + 4
    assert InputPath(shift=True).shapes(32, 16) == {"input_shift": (32,)}
    assert InputPath(shift=True).num_bytes(32, 16) == 2 * 32
    assert not InputPath(shift=True).empty
    assert InputPath().num_bytes(32, 16) == 0
    assert InputPath(right=16).shapes(48, 16) == {"transform_right": (16, 16)}  # three blocks
    for path in (PATH, InputPath(left=4), InputPath(right=32)):
        with pytest.raises(InvalidInputError, match="expected a product of 48"):
            path.shapes(48, 16)


def test_a_low_rank_branch_has_a_basis_in_float8_and_a_weight_in_bfloat16():
    path = InputPath(low_rank=4)
    assert not path.empty
    assert path.shapes(32, 16) == {"low_rank_basis": (32, 4), "low_rank_weight": (16, 4)}
    assert path.num_bytes(32, 16) == 4 * (32 + 2 * 16)
    with pytest.raises(InvalidInputError, match="rank 4; expected at most 3 between 32 and 3 features"):
        path.shapes(32, 3)


def test_only_a_branch_of_the_weight_says_that_it_does_not_deflate():
    branch = InputPath(low_rank=4, deflates=False)
    content = config(a=PATH, b=branch)
    assert ["deflates" in path for path in content["inputs"].values()] == [False, True]
    assert S2QConfig.from_dict(content).layer_paths() == {"a": PATH, "b": branch}
    assert (branch.num_bytes(32, 16), branch.empty) == (InputPath(low_rank=4).num_bytes(32, 16), False)
