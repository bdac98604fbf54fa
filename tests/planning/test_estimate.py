"""Counted work and estimated time of a run on a GPU that is not here."""

from dataclasses import replace

import pytest
import step_counts
import torch

from s2q.common.errors import InvalidInputError
from s2q.models import FAMILIES
from s2q.planning import compare_recipes, flop, gpus, plan
from s2q.planning.cost import BlockShape
from s2q.planning.flop import Work, forward_work, reaching_work, step_work
from s2q.planning.gpus import EXPECTED, FAST, SLOW, gpu
from s2q.rounding.gptq import round_gptq
from schemes import weights

MODEL = "synthetic:wan-1.3b"
SHAPE = BlockShape(
    parameters=0,
    weights=(8 * 16,),
    inputs=((8, 10),),
    outputs=((16, 10),),
    streams=(8, 10),
    rotations=(6,),
    ranks=(2,),
    attention=((10, 4, 16),),
)


def stages(**arguments):
    return {stage.name: stage for stage in plan(MODEL, **arguments).stages}


def test_flop_of_a_forward_pass_by_hand():
    plain, quantized = forward_work(SHAPE, torch.bfloat16), forward_work(SHAPE, torch.bfloat16, quantized=True)
    assert plain.products == {"bf16": 2 * 8 * 16 * 10}
    assert plain.attention == quantized.attention == {"bf16": 4 * 10 * 4 * 16}
    assert quantized.products == {"bf16": 2 * 8 * 16 * 10 + 2 * 8 * 10 * (6 + 2 * 2)}
    assert quantized.traffic > plain.traffic > 0


def test_flop_of_a_step_by_hand():
    step, forward = (
        step_work(SHAPE, torch.float32, checkpointed=False),
        forward_work(SHAPE, torch.float32, quantized=True),
    )
    assert step.products == {"fp32": 3 * forward.products["fp32"] + 3 * 2 * 6 * 8 * 16}
    assert step.attention == {"fp32": 3.5 * forward.attention["fp32"]}
    again = step_work(SHAPE, torch.float32, checkpointed=True)
    assert again.flop == step.flop + forward.flop
    assert again.traffic == step.traffic + forward.traffic


def test_seconds_are_work_over_rates_times_efficiency():
    h100 = gpu("H100")
    assert h100.seconds(Work({"bf16": h100.flops["bf16"]})) == pytest.approx(1 / EXPECTED.products)
    assert h100.seconds(Work({"fp64": h100.flops["fp64"]})) == pytest.approx(3 / EXPECTED.products)
    assert h100.seconds(Work(attention={"fp32": h100.flops["fp32"]})) == pytest.approx(1 / EXPECTED.attention)
    assert h100.seconds(Work(traffic=h100.bandwidth)) == pytest.approx(1 / EXPECTED.memory)
    assert h100.seconds(Work(transfer=h100.link)) == pytest.approx(1 / EXPECTED.link)
    launching = Work({"bf16": 1.0}, launches=1e6)
    assert h100.seconds(launching) == pytest.approx(1e6 * EXPECTED.launch_seconds)  # the device waits for the host


@pytest.mark.parametrize("name", gpus())
def test_data_of_a_gpu_are_plausible_and_sourced(name):
    rates = gpu(name)
    assert rates.flops["bf16"] > rates.flops["tf32"] >= rates.flops["fp32"] > rates.flops["fp64"] > 0
    assert 1e11 < rates.bandwidth < 1e13
    assert 20e9 < rates.memory_bytes < 200e9
    assert "NVIDIA" in rates.source
    work = Work({"bf16": 1e15}, {"bf16": 1e15}, traffic=1e12)
    assert rates.seconds(work, FAST) < rates.seconds(work) < rates.seconds(work, SLOW)


def test_a_plan_for_a_gpu_has_its_memory_and_the_hours_of_all_stages():
    planned = plan(MODEL, device="h100")
    assert planned.device == {"name": "h100", "memory_bytes": 80 * 10**9}
    estimate = planned.estimate
    assert sum(stage.seconds or 0 for stage in planned.stages) == pytest.approx(3600 * estimate.gpu_hours, rel=0.01)
    assert estimate.low < estimate.gpu_hours < estimate.high
    assert plan(MODEL, device="cuda", device_memory="80GB").estimate is None


def test_the_estimate_follows_the_dtype_of_calibration_and_the_epochs():
    wide, narrow, short = (
        stages(device="h100", overrides=overrides)
        for overrides in (["calibration.precision=float32"], (), ["distillation.epochs=5"])
    )
    assert wide["blocks"].flop == pytest.approx(narrow["blocks"].flop)
    assert wide["blocks"].seconds > 4 * narrow["blocks"].seconds
    assert wide["collect"].seconds == narrow["collect"].seconds
    assert short["blocks"].flop < 0.5 * narrow["blocks"].flop


def test_collecting_counts_prompts_steps_and_both_branches():
    tenth = stages(device="a100", overrides=["calibration.n_prompts=1"])["collect"].flop
    assert stages(device="a100")["collect"].flop == pytest.approx(10 * tenth)
    parameters_and_tokens = 2 * 1.3e9 * 32760  # linears alone, at least
    assert tenth > 50 * 2 * parameters_and_tokens


def test_recipes_are_compared_and_one_that_does_not_fit_says_why():
    rows = compare_recipes(MODEL, ["s2q-w4a6", "rtn-w4a8"], device="4090")
    assert [row["recipe"] for row in rows] == ["s2q-w4a6", "rtn-w4a8"]
    assert rows[0]["estimate"]["gpu_hours"] > 100 * rows[1]["estimate"]["gpu_hours"] > 0
    assert (
        rows[0]["velocity_relative_error"]["shapes-cogvideox"] < rows[1]["velocity_relative_error"]["shapes-cogvideox"]
    )
    few, mixed = compare_recipes(MODEL, ["q-dit-w4a4", "vidit-q-mp-w4a4"], overrides=["allocation.budget=4.05"])
    assert "allocation.budget=4.05 bits per weight" in few["refused"]
    assert (mixed["estimate"], mixed["storage"]["ratio"] > 3) == (None, True)
    with pytest.raises(InvalidInputError, match=r"allocation\.budget=4\.05 bits per weight"):
        compare_recipes(MODEL, ["q-dit-w4a4"], overrides=["allocation.budget=4.05"])
    with pytest.raises(InvalidInputError, match="unknown recipe"):
        compare_recipes(MODEL, ["rtn-w4a8", "nothing-w4a4"])


def test_an_unknown_gpu_is_refused_with_the_names():
    with pytest.raises(InvalidInputError, match="device='h900' is unknown.*h100, h200, a100, b200, 4090, 5090, 3090"):
        plan(MODEL, device="h900")


def test_blocks_that_are_not_chained_are_reached_by_the_blocks_before_them(monkeypatch):
    """VACE runs the transformer up to each block: on average through half of its blocks, not through one."""
    arguments = {"recipe": "s2q-w4a6", "device": "h100"}
    unchained = plan("synthetic:wan-vace-14b", **arguments)
    name = "WanVACETransformer3DModel"
    monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], chained=True))
    as_others = plan("synthetic:wan-vace-14b", **arguments)
    assert 1.03 < unchained.estimate.gpu_hours / as_others.estimate.gpu_hours < 1.5


def test_passes_that_reach_blocks_by_hand():
    once = forward_work(SHAPE, torch.float32)
    for chained, passes in ((True, 4), (False, 3 + 2 + 1)):
        reached = reaching_work([SHAPE] * 4, torch.float32, samples=5, chained=chained)
        assert reached.products == {rate: 5 * passes * flop for rate, flop in once.products.items()}


@pytest.mark.parametrize(
    ("levels", "group_size", "launches"),
    [("uniform", None, flop._COLUMN_LAUNCHES), ("table", 16, flop._TABLE_LAUNCHES)],
)
def test_operations_of_gptq_are_as_many_as_planned(levels, group_size, launches):
    def counts(columns, rows):
        x, weight = torch.randn(3 * columns, columns), torch.randn(rows, columns)
        scheme = weights(4, group_size=group_size, levels=levels)
        return step_counts.counted(lambda: round_gptq([weight], scheme, hessian=x.t() @ x))

    small, long, wide = counts(64, 16), counts(128, 16), counts(128, 32)
    assert (long[0] - small[0]) / 64 == pytest.approx(launches, rel=0.05)
    assert wide[0] == long[0]
    if levels == "table":
        assert (wide[1] - long[1]) / (16 * 128) == pytest.approx(flop._TABLE_BYTES, rel=0.3)  # more in wider weights
