"""Planned memory: near what was traced, and what it decides: checkpointing, the disk, refusal."""

from dataclasses import replace

import pytest
import torch
from step_memory import Case, planned_bytes, traced_bytes

import s2q
from quick import quick
from s2q.common.errors import InvalidInputError, ResourceError
from s2q.models.synthetic import synthetic_model
from s2q.planning import Machine, check_memory, plan_model, plan_transformers, tensor_sizes, this_machine
from s2q.planning.cost import PartBytes, Workload, block_shapes
from s2q.planning.resolve import recipe_linears, resolve
from s2q.planning.workload import workload_of_synthetic
from s2q.recipes.load import load_recipe
from tiny import tiny_pipeline

RECIPE = load_recipe("s2q-w4a6")
STEP = {"checkpointed": False, "itemsize": 4}
GPU = {"device": "cuda", "memory_budget": 16 * 10**9}


def shapes_of(name):
    model = synthetic_model(name)
    transformers = {"transformer": model.meta_transformer()}
    workload = workload_of_synthetic(model, RECIPE)
    return block_shapes(transformers, recipe_linears(RECIPE, transformers), workload)


def plan(model, *, recipe, overrides=(), machine=None):
    return plan_model(model, load_recipe(recipe, overrides=overrides), machine=machine or this_machine("cpu"))


def machine(memory, **changes):
    described = GPU | {"memory_bytes": memory} | changes
    return Machine(**described, bf16_products=described["device"] != "cpu")


@pytest.mark.parametrize("recompute", quick([False, True], True))
@pytest.mark.parametrize(
    ("recipe", "name", "index"),
    [
        ("s2q-w4a6", "ltx-2b", 0),
        ("s2q-plus-w4a6", "ltx-2b", 0),
        ("s2q-plus-w4a4", "ltx-2b", 0),
        ("q-vdit-w4a6", "ltx-2b", 0),
        ("s2q-plus-w4a6", "hunyuanvideo", 1),
        ("q-vdit-w4a6", "wan-1.3b", 0),
        ("s2q-w4a6", "kandinsky5-lite", 0),
        ("s2q-w4a6", "sana-video-2b", 0),
    ],
)
def test_planned_memory_of_a_step_is_0_8_to_1_35_of_the_traced(recipe, name, index, recompute):
    model = synthetic_model(name)
    case = Case(
        model=model,
        block_list=model.block_lists[index],
        recipe=load_recipe(recipe),
        tokens=4096,
        dtype=torch.float32,
        recompute=recompute,
    )
    assert 0.8 <= planned_bytes(case) / traced_bytes(case) <= 1.35


def test_differences_from_local_means_add_little_to_a_checkpointed_step():
    """Their pieces are pairs of frames: HunyuanVideo at its 118,800 tokens, as traced and as planned."""
    model = synthetic_model("hunyuanvideo")
    with_differences, without = (
        Case(
            model=model,
            block_list=model.block_lists[1],
            recipe=load_recipe("s2q-plus-w4a4", overrides=overrides),
            tokens=118_800,
            dtype=torch.bfloat16,
            recompute=True,
        )
        for overrides in ([], ["activations.delta=null"])
    )
    traced = traced_bytes(with_differences)
    assert traced < 1.05 * traced_bytes(without)
    assert 0.8 <= planned_bytes(with_differences) / traced <= 1.35
    planned = plan("synthetic:hunyuanvideo", recipe="s2q-plus-w4a4", machine=machine(24 * 10**9))
    assert planned.calibration.gradient_checkpointing
    check_memory(planned)


def test_a_piece_has_whole_cubes_however_large_a_frame_is():
    recipe, without = (load_recipe("s2q-plus-w4a4", overrides=more) for more in ([], ["activations.delta=null"]))
    shape = replace(shapes_of("wan-14b")[0], attention=((1, 1, 1),), joint=0)  # the piece is the largest part
    assert shape.frame == 30 * 52

    def step_bytes(recipe, frame):
        return replace(shape, frame=frame).step_bytes(recipe, checkpointed=True, itemsize=4)

    assert step_bytes(recipe, 10_000) > 1.3 * step_bytes(recipe, 4096)
    assert step_bytes(without, 10_000) == step_bytes(without, 4096)
    shape = replace(shape, outputs=((13_824, 8000),))  # is not cut
    assert step_bytes(recipe, 2500) == step_bytes(recipe, 1000)


@pytest.mark.parametrize("recompute", [False, True])
def test_learned_rounding_is_planned_with_what_it_holds(recompute):
    """To what a step holds come, for each weight, V, its best state, two moments of AdamW, and a code."""
    model, recipe = synthetic_model("wan-14b"), load_recipe("ptq4dit-w4a6")
    case = Case(
        model=model,
        block_list=model.block_lists[0],
        recipe=recipe,
        tokens=1024,
        dtype=torch.float32,
        recompute=recompute,
    )
    weights = 4 * 2 * 5120**2 + 2 * 5120 * 13824
    held = traced_bytes(case) + 17 * weights
    assert held <= planned_bytes(case) < 1.3 * held


def test_a_step_that_does_not_fit_is_checkpointed():
    large, small = (
        plan("synthetic:cogvideox-5b", recipe="s2q-w4a6", machine=machine(size)) for size in (80e9, 16 * 10**9)
    )
    assert not large.calibration.gradient_checkpointing
    assert small.calibration.gradient_checkpointing
    assert small.calibration.step_bytes < 0.5 * large.calibration.step_bytes
    assert small.stages[2].peak_memory_bytes < 16e9 < large.stages[2].peak_memory_bytes


def test_published_sizes_fit_their_devices():
    """CogVideoX-2B below 16 GB, HunyuanVideo below 40 GB, at the real token counts, without their text encoders."""
    for name, memory in (("cogvideox-2b", 16 * 10**9), ("hunyuanvideo", 40 * 10**9)):
        planned = plan(f"synthetic:{name}", recipe="s2q-w4a6", machine=machine(memory))
        check_memory(planned)
        assert planned.calibration.tokens > 17_000


def test_what_memory_has_no_room_for_lies_on_the_disk():
    whole, part = (
        plan("synthetic:cogvideox-2b", recipe="s2q-w4a6", machine=machine(80e9, memory_budget=size)).calibration
        for size in (17 * 10**9, 10**9)
    )
    assert whole.disk_bytes == 0
    assert part.disk_bytes == whole.activation_bytes - 10**9


def test_page_locked_samples_are_counted_in_powers_of_two():
    tokens, channels = 17_550 + 226, 1920
    on_gpu = plan("synthetic:cogvideox-2b", recipe="s2q-w4a6", machine=machine(80 * 10**9)).calibration
    assert tokens * channels * 2 <= 1 << 27
    assert on_gpu.activation_bytes == 40 * ((1 << 27) + (1 << 27) + (1 << 17))
    on_cpu = plan("synthetic:cogvideox-2b", recipe="s2q-w4a6", machine=machine(None, device="cpu")).calibration
    assert on_cpu.activation_bytes == 40 * tokens * (channels * (2 + 4) + 4)
    assert (on_gpu.dtype, on_cpu.dtype) == ("bfloat16", "float32")


def test_a_gpu_holds_the_sample_at_hand():
    shape = max(shapes_of("hunyuanvideo"), key=lambda shape: shape.peak_bytes(RECIPE, **STEP, on_host=False))
    added = shape.peak_bytes(RECIPE, **STEP, on_host=False) - shape.peak_bytes(RECIPE, **STEP, on_host=True)
    rows, channels = 118_800 + 256, 3072
    assert added == rows * (channels * (4 + 4) + 4)


def test_directions_of_low_rank_branches_are_planned():
    shape = max(shapes_of("hunyuanvideo"), key=lambda shape: max(features for features, _ in shape.inputs))
    widest = max(features for features, _ in shape.inputs)
    assert shape.basis_bytes(RECIPE) == 0
    from_input = load_recipe("s2q-plus-w4a6")
    assert shape.basis_bytes(from_input) == 52 * widest**2 + 4 * sum(features**2 for features, _ in shape.inputs)


def test_a_step_on_the_cpu_takes_its_part_of_the_budget():
    on_host = plan(
        "synthetic:cogvideox-2b", recipe="s2q-w4a6", machine=machine(None, device="cpu", memory_budget=8 * 10**9)
    )
    assert on_host.calibration.gradient_checkpointing
    left = 8 * 10**9 - on_host.calibration.step_bytes
    assert on_host.calibration.disk_bytes == on_host.calibration.activation_bytes - left


def test_too_little_memory_is_refused_with_what_it_takes():
    planned = plan("synthetic:hunyuanvideo", recipe="s2q-w4a6", machine=machine(16 * 10**9))
    with pytest.raises(
        ResourceError, match=r"hunyuanvideo: stage blocks needs about 1[67]\.\d GB on cuda, which has 16"
    ):
        check_memory(planned)
    check_memory(plan("synthetic:hunyuanvideo", recipe="s2q-w4a6", machine=machine(None)))


def test_workers_need_memory_each():
    planned = plan("synthetic:cogvideox-2b", recipe="s2q-w4a6", machine=machine(64 * 10**9, device="cpu"))
    check_memory(planned)
    with pytest.raises(ResourceError, match=r"stage collect in 8 workers needs about .*; take fewer \(--workers\)"):
        check_memory(planned, workers=8)


@pytest.mark.parametrize(
    ("recipe", "precision", "bf16_products", "dtype"),
    [
        ("s2q-w4a6", "auto", True, torch.bfloat16),
        ("s2q-w4a6", "auto", False, torch.float32),
        ("s2q-plus-w8a8", "auto", True, torch.float32),
        ("s2q-plus-w4a8", "auto", True, torch.bfloat16),
        ("s2q-plus-w8a8", "bfloat16", False, torch.bfloat16),
        ("s2q-w4a6", "float32", True, torch.float32),
        ("s2q-w4a6", "model", True, torch.float16),
    ],
)
def test_blocks_are_calibrated_in_bf16_where_its_error_is_small_beside_theirs(recipe, precision, bf16_products, dtype):
    validated = load_recipe(recipe, overrides=[f"calibration.precision={precision}"])
    assert validated.calibration_dtype(torch.float16, bf16_products=bf16_products) == dtype


def test_a_gpu_by_name_is_planned_alike_wherever_the_plan_is_made(monkeypatch):
    monkeypatch.setattr("s2q.planning.cost.has_bf16_products", lambda device: False)
    assert s2q.plan("synthetic:cogvideox-2b", device="h100").calibration.dtype == "bfloat16"
    assert s2q.plan("synthetic:cogvideox-2b", device="cuda", device_memory="24GB").calibration.dtype == "bfloat16"
    assert s2q.plan("synthetic:cogvideox-2b").calibration.dtype == "float32"


def test_calibration_in_bf16_takes_less():
    wide, half = (
        plan(
            "synthetic:wan-14b",
            recipe="s2q-w4a6",
            overrides=[f"calibration.precision={precision}"],
            machine=machine(60 * 10**9),
        )
        for precision in ("float32", "auto")
    )
    assert half.calibration.activation_bytes < 0.7 * wide.calibration.activation_bytes
    assert half.calibration.step_bytes < wide.calibration.step_bytes  # transforms are in fp32 in both


def test_the_embedded_model_is_planned_from_its_configuration():
    planned = plan("shapes-cogvideox", recipe="s2q-w4a6")
    cost = planned.calibration
    assert (cost.tokens, cost.text_tokens, cost.samples) == (192, 16, 40)
    assert planned.device["name"] == "cpu"
    assert all(stage.peak_memory_bytes > 100e6 for stage in planned.stages)


def test_activations_are_as_wide_as_the_video_where_the_text_is_narrower():
    transformers = {"transformer": tiny_pipeline("mochi").transformer}
    workload = Workload(tokens=1000, frames=5, text_tokens=8, branches=2, rows=2, components={})
    recipe = load_recipe("s2q-w4a6", overrides=["calibration.samples=1", "calibration.branches=conditional"])
    planned = plan_transformers(
        transformers,
        recipe,
        resolve(recipe, recipe_linears(recipe, transformers)),
        model="tiny",
        sizes=tensor_sizes(transformers),
        dtype=torch.float32,
        workload=workload,
        machine=machine(None, device="cpu"),
    )
    a_token = 64 * (4 + 4) + 4  # its input, its target, its weight
    assert planned.calibration.activation_bytes == (1000 + 8) * a_token


@pytest.mark.parametrize("recipe", ["s2q-w4a6", "rtn-w4a6"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_weights_that_the_process_holds_count_once(monkeypatch, device, recipe):
    monkeypatch.setattr(Machine, "process_bytes", 10**9)
    transformers, others = {"transformer": tiny_pipeline("cogvideox").transformer}, 10**8
    sizes, loaded = tensor_sizes(transformers), load_recipe(recipe)
    components = {"vae": PartBytes.of(others)}
    workload = Workload(tokens=12, frames=3, text_tokens=8, branches=2, rows=2, components=components)
    fresh, held = (
        plan_transformers(
            transformers,
            loaded,
            resolve(loaded, recipe_linears(loaded, transformers)),
            model="tiny",
            sizes=sizes,
            dtype=torch.float32,
            workload=workload,
            machine=machine(None, device=device, holds_weights=one),
        )
        for one in (False, True)
    )
    first, again = fresh.stages[0].peak_memory_bytes, held.stages[0].peak_memory_bytes
    weights = sum(sizes.values()) + (others if recipe == "s2q-w4a6" else 0)
    assert first - again == (weights if device == "cpu" else 0)


def test_sizes_of_the_recipe_count_and_are_checked(tmp_path):
    tiny_pipeline("cogvideox").save_pretrained(tmp_path)
    sizes = ["calibration.num_frames=9", "calibration.height=32", "calibration.width=16"]
    assert plan(tmp_path, recipe="s2q-w4a6", overrides=sizes).calibration.tokens == 3 * 2 * 1
    with pytest.raises(InvalidInputError, match="height"):
        plan(tmp_path, recipe="s2q-w4a6", overrides=["calibration.height=33"])
    with pytest.raises(InvalidInputError, match="no pipeline to fit calibration.num_frames to"):
        plan("synthetic:wan-14b", recipe="s2q-w4a6", overrides=["calibration.num_frames=9"])


def test_both_branches_are_as_many_samples_more_whichever_way_they_are_called():
    for name in ("cogvideox-2b", "wan-1.3b"):
        taken, both = (
            plan(
                f"synthetic:{name}",
                recipe="s2q-w4a6",
                overrides=[f"calibration.branches={one}"],
                machine=machine(80 * 10**9),
            )
            for one in ("alternate", "both")
        )
        assert (taken.calibration.samples, both.calibration.samples) == (40, 80)
