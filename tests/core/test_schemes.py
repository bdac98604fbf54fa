import dataclasses
import json

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.packing import pack_codes, weight_bytes
from s2q.core.schemes import (
    LinearScheme,
    PerChannel,
    PerGroup,
    PerToken,
    QuantScheme,
    num_groups,
)

W4 = QuantScheme(num_bits=4, granularity=PerChannel())
A6 = QuantScheme(num_bits=6, granularity=PerToken(), dynamic=True)


@pytest.mark.parametrize("num_bits", [1, 9, 0, -4, 4.0, "4", None, True])
def test_other_widths_are_refused(num_bits):
    with pytest.raises(InvalidInputError, match="num_bits"):
        QuantScheme(num_bits=num_bits, granularity=PerChannel())


@pytest.mark.parametrize("group_size", [0, -1, 1.5, "64", True])
def test_group_size_must_be_a_positive_whole_number(group_size):
    with pytest.raises(InvalidInputError, match="group_size"):
        PerGroup(group_size=group_size)


def test_granularity_must_be_an_instance():
    with pytest.raises(InvalidInputError, match="granularity"):
        QuantScheme(num_bits=4, granularity=PerChannel)


def test_schemes_are_values():
    assert QuantScheme(num_bits=4, granularity=PerGroup(group_size=64)) == QuantScheme(
        num_bits=4, granularity=PerGroup(group_size=64)
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        W4.num_bits = 5


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(group_size=32), PerToken()])
@pytest.mark.parametrize("dynamic", [True, False])
def test_scheme_survives_json(granularity, dynamic):
    scheme = QuantScheme(num_bits=3, granularity=granularity, dynamic=dynamic)
    assert QuantScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_levels_survive_json_and_are_written_only_where_they_are_not_uniform():
    codebook = dataclasses.replace(W4, levels="lloyd_max")
    assert codebook.to_dict()["levels"] == "lloyd_max"
    assert QuantScheme.from_dict(json.loads(json.dumps(codebook.to_dict()))) == codebook
    assert "levels" not in W4.to_dict()


@pytest.mark.parametrize("activation", [None, A6])
def test_linear_scheme_survives_json(activation):
    scheme = LinearScheme(weight=W4, activation=activation)
    assert LinearScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bit": 4}, "num_bits"),  # names the nearest key
        ({"granularity": "per_chanel"}, "per_channel"),
        ({"granularity": "per_group"}, "group_size"),
        ({"group_size": 64}, "group_size"),
        ({"granularity": None}, "granularity"),
        ({"dynamic": "no"}, "dynamic"),
        ({"levels": "loyd_max"}, "lloyd_max"),
        ({"levels": None}, "levels"),
    ],
)
def test_wrong_fields_are_refused(change, message):
    with pytest.raises(InvalidInputError, match=message):
        QuantScheme.from_dict(W4.to_dict() | change)


@pytest.mark.parametrize("fields", [{"weight": W4.to_dict()}, [], None, {"weight": 4, "activation": None}])
def test_incomplete_linear_scheme_is_refused(fields):
    with pytest.raises(InvalidInputError, match=r"weight|scheme"):
        LinearScheme.from_dict(fields)


def test_scheme_names_tell_widths_groups_and_levels():
    grouped = QuantScheme(num_bits=4, granularity=PerGroup(group_size=64))
    assert LinearScheme(weight=W4, activation=A6).name == "w4a6"
    assert LinearScheme(weight=W4, activation=None).name == "w4a16"
    assert LinearScheme(weight=grouped, activation=None).name == "w4g64a16"
    codebook = dataclasses.replace(grouped, levels="lloyd_max")
    assert LinearScheme(weight=codebook, activation=dataclasses.replace(A6, levels="lloyd_max")).name == "w4cg64a6c"


def test_codebooks_on_either_side_are_simulated():
    codebooks = dataclasses.replace(W4, levels="lloyd_max"), dataclasses.replace(A6, levels="lloyd_max")
    assert not LinearScheme(weight=W4, activation=A6).simulated
    assert LinearScheme(weight=codebooks[0], activation=A6).simulated
    assert LinearScheme(weight=codebooks[0], activation=None).simulated
    assert LinearScheme(weight=W4, activation=codebooks[1]).simulated


def test_linear_scheme_refuses_what_no_linear_can_do():
    with pytest.raises(InvalidInputError, match="static"):
        LinearScheme(weight=dataclasses.replace(W4, dynamic=True), activation=None)
    with pytest.raises(InvalidInputError, match="PerChannel or PerGroup"):
        LinearScheme(weight=dataclasses.replace(W4, granularity=PerToken()), activation=None)
    with pytest.raises(InvalidInputError, match="PerToken"):
        LinearScheme(weight=W4, activation=dataclasses.replace(A6, granularity=PerChannel()))
    with pytest.raises(InvalidInputError, match="dynamic"):
        LinearScheme(weight=W4, activation=dataclasses.replace(A6, dynamic=False))


def test_indivisible_groups_name_the_sizes_that_fit():
    with pytest.raises(InvalidInputError, match="in_features=1536.*group_size=100.*64, 128, 256"):
        num_groups(QuantScheme(num_bits=4, granularity=PerGroup(group_size=100)), 1536)
    with pytest.raises(InvalidInputError, match="per_channel"):
        num_groups(QuantScheme(num_bits=4, granularity=PerGroup(group_size=4)), 13)


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize(("out_features", "in_features"), [(3, 8), (5, 7), (1, 1)])
def test_weight_bytes_are_what_the_packed_tensors_take(num_bits, out_features, in_features):
    scheme = QuantScheme(num_bits=num_bits, granularity=PerChannel())
    packed = pack_codes(torch.zeros(out_features, in_features, dtype=torch.int8), num_bits=num_bits)
    assert weight_bytes(scheme, out_features, in_features) == packed.nbytes + 2 * out_features


def test_weight_bytes_count_every_group_scale():
    scheme = QuantScheme(num_bits=4, granularity=PerGroup(group_size=4))
    assert weight_bytes(scheme, 2, 8) == 2 * 4 + 2 * 2 * 2
