"""Memory of the stages of a run under each offload, and the offload that is chosen."""

import re

import pytest
import torch

from s2q.cli.output import _fit_notes
from s2q.common.errors import InvalidInputError, ResourceError, UsageError
from s2q.planning import Machine, check_memory, plan
from s2q.planning.cost import PartBytes
from s2q.planning.peaks import chosen_offload, collect_bytes, transformer_parts
from s2q.planning.plan import tensor_sizes
from tiny import tiny_pipeline

TRANSFORMERS = (PartBytes.of(28, [2] * 10), PartBytes.of(28, [2] * 10))
OTHERS = (PartBytes.of(11, [1] * 8), PartBytes.of(1))


def machine(memory, **changes):
    return Machine(**{"device": "cuda", "memory_bytes": memory, "memory_budget": 10**9} | changes)


def test_bytes_of_each_offload():
    assert PartBytes.of(28, [2] * 10) == PartBytes(whole=28, paged=28 - 20 + 4)
    assert PartBytes.of(5, [3]) == PartBytes(whole=5, paged=5)
    assert collect_bytes("none", TRANSFORMERS, OTHERS, forward=3) == 28 + 28 + 11 + 1 + 3
    assert collect_bytes("model", TRANSFORMERS, OTHERS, forward=3) == 28 + 3
    assert collect_bytes("group", TRANSFORMERS, OTHERS, forward=3) == 12 + 3
    assert collect_bytes("model", TRANSFORMERS, (PartBytes.of(40),), forward=3) == 40
    assert collect_bytes("none", TRANSFORMERS, (), forward=3) == 28 + 28 + 3


@pytest.mark.parametrize(
    ("memory", "expected"), [(80, "none"), (71, "model"), (40, "model"), (33, "group"), (1, "group"), (None, "none")]
)
def test_the_first_offload_that_fits_is_chosen(memory, expected):
    assert chosen_offload(machine(memory), TRANSFORMERS, OTHERS, forward=3) == expected
    assert chosen_offload(machine(memory, offload="model"), TRANSFORMERS, OTHERS, forward=3) == "model"
    assert chosen_offload(machine(memory, device="cpu"), TRANSFORMERS, OTHERS, forward=3) == "none"
    shared = None if memory is None else 3 * memory
    assert chosen_offload(machine(shared, sharing=3), TRANSFORMERS, OTHERS, forward=3) == expected


def test_parts_of_a_pair_are_counted_by_tensor():
    pipe = tiny_pipeline("wan 2.2 a14b", num_layers=3)
    transformers = {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
    parts = transformer_parts(transformers, tensor_sizes(transformers))
    for component, transformer in transformers.items():
        blocks = [sum(tensor.nbytes for tensor in block.parameters()) for block in transformer.blocks]
        assert parts[component].whole == sum(tensor.nbytes for tensor in transformer.state_dict().values())
        assert parts[component].whole - parts[component].paged == sum(sorted(blocks)[:-2])


@pytest.mark.parametrize(
    ("model", "overrides", "offload"),
    [
        ("wan-14b", (), "group"),
        ("wan-a14b", (), "group"),
        ("wan-vace-14b", (), "group"),
        ("wan-animate-14b", (), "group"),
        ("hunyuanvideo", (), "group"),
        ("hunyuanvideo", ("calibration.max_tokens=72000",), "group"),
        ("ltx-2", (), "group"),
        ("cogvideox-5b", (), "model"),
        ("cogvideox-2b", (), "none"),
    ],
)
def test_published_models_calibrate_on_24_gb(model, overrides, offload):
    planned = plan(f"synthetic:{model}", device="4090", overrides=overrides)
    check_memory(planned)
    assert planned.device["memory_bytes"] == 24 * 10**9
    assert planned.offload == offload
    assert planned.fitting_tokens is None
    (note,) = _fit_notes(planned.to_dict())
    assert note.startswith("Fits in 24 GB: yes")
    assert ("at a time" in note) == (offload != "none")


def test_a_pair_takes_no_more_memory_than_one_of_its_transformers():
    one, pair = (plan(f"synthetic:{name}", device="4090") for name in ("wan-14b", "wan-a14b"))
    assert [stage.peak_memory_bytes for stage in one.stages] == [stage.peak_memory_bytes for stage in pair.stages]
    assert pair.storage["quantized_bytes"] == 2 * one.storage["quantized_bytes"]


def test_what_does_not_fit_names_the_tokens_that_do():
    needs = {"recipe": "q-vdit-w4a6", "device": "4090"}
    planned = plan("synthetic:hunyuanvideo", **needs)
    with pytest.raises(
        ResourceError, match=r"stage blocks needs about [23]\d\.\d GB on 4090.*max_tokens=82800, which fits; "
    ):
        check_memory(planned)
    (note,) = _fit_notes(planned.to_dict())
    assert re.match(r"Does not fit: blocks needs .* set calibration.max_tokens=82800", note)
    tokens = planned.fitting_tokens
    for number, fits in ((tokens, True), (tokens + 3600, False)):
        smaller = plan("synthetic:hunyuanvideo", **needs, overrides=[f"calibration.max_tokens={number}"])
        assert smaller.calibration.tokens == number
        assert (max(stage.peak_memory_bytes for stage in smaller.stages) <= 24e9) == fits
    assert plan("synthetic:hunyuanvideo", device="cuda", device_memory="2GB").fitting_tokens is None


def test_tokens_that_fit_a_cpu_do():
    """A process on a CPU has more than tensors: what it took before, libraries, activations of all samples."""

    def planned(memory, *overrides):
        arguments = {"recipe": "s2q-w4a6", "device": "cpu", "memory_budget": "16GB", "overrides": overrides}
        return plan("synthetic:cogvideox-5b", device_memory=memory, **arguments)

    memory = planned("1000GB").stages[-1].peak_memory_bytes - 3 * 10**8
    tokens = planned(memory).fitting_tokens
    assert tokens is not None
    check_memory(planned(memory, f"calibration.max_tokens={tokens}"))
    assert planned(10**9).fitting_tokens is None


def test_samples_that_come_after_blocks_take_the_peak_of_blocks():
    once, twice = (
        {stage.name: stage.peak_memory_bytes for stage in planned.stages}
        for planned in (
            plan("synthetic:wan-a14b", device="4090", overrides=[f"calibration.trajectory_2={which}"])
            for which in ("full_precision", "quantized")
        )
    )
    assert once["collect"] < once["blocks"] == twice["blocks"]
    assert twice["collect"] == twice["select"] == once["blocks"]


def test_too_little_offload_names_more():
    planned = plan("synthetic:wan-14b", device="4090", offload="model")
    with pytest.raises(ResourceError, match=r"stage collect needs .* offload more \(--offload group, offload=\)"):
        check_memory(planned)


def test_group_offload_takes_time():
    paged, whole = (plan("synthetic:wan-14b", device="h100", offload=way) for way in ("group", "none"))
    copied = 50 * 10 * 2 * sum(tensor_sizes_of("wan-14b").values())
    collect = {name: planned.stages[0].seconds for name, planned in (("group", paged), ("none", whole))}
    assert collect["group"] - collect["none"] == pytest.approx(copied / (0.7 * 64e9), rel=0.01)
    assert paged.stages[0].flop == whole.stages[0].flop
    assert paged.stages[2].seconds == whole.stages[2].seconds


def tensor_sizes_of(name):
    from s2q.models.synthetic import synthetic_model

    return tensor_sizes({"transformer": synthetic_model(name).meta_transformer()}, torch.bfloat16)


def test_offload_is_refused_where_it_means_nothing():
    with pytest.raises(UsageError, match=r"offload=group \(--offload\): cpu computes in host memory; use auto or none"):
        plan("synthetic:wan-14b", offload="group")
    with pytest.raises(InvalidInputError, match=r"unknown offload 'disk': all: auto, group, model, none"):
        plan("synthetic:wan-14b", device="4090", offload="disk")
    assert plan("synthetic:wan-14b").offload == "none"
    assert plan("synthetic:wan-14b", recipe="rtn-w4a6", device="4090").offload is None
