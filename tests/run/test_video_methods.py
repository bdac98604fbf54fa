"""The recipes that look at frames: DeltaQuant's differences from local means, Q-VDiT's estimator and temporal loss."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline

from s2q.blocks.distil import checkpoint_parts
from s2q.checkpoint import inspect_checkpoint, load_pipeline
from s2q.common.errors import InvalidInputError, UsageError
from s2q.core.memo import memoization
from s2q.core.schemes import Delta
from s2q.core.tokens import TokenGrid, current_grid, token_grid
from s2q.models import family_of
from s2q.nn import PackedLinear, StudentLinear
from s2q.ops.fake_quantize import fake_quantize_input
from s2q.planning import plan
from s2q.recipes.load import load_recipe
from s2q.run.quantize import quantize
from tiny import TINY_CALL, tiny_pipeline, transformer_inputs

WIDTHS = ("w8a8", "w4a8", "w4a6", "w4a4")
LARGER = {"num_inference_steps": 2, "num_frames": 9, "height": 64, "width": 32}
SIZES = [f"calibration.{key}={LARGER[key]}" for key in ("num_frames", "height", "width")]
SMALL = ["calibration.n_prompts=1", "calibration.steps=2", "calibration.samples=2", "calibration.branches=conditional"]
MODELS = {
    "cogvideox": (TINY_CALL, [], (3, 1, 1)),
    "wan": (LARGER, SIZES, (3, 4, 2)),
    "hunyuanvideo": (LARGER, SIZES, (3, 4, 2)),
}


def latents(pipe, call, **more):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt="a", output_type="latent", generator=generator, **{**call, **more}).frames


def grids_seen(transformer):
    """Fills with the grids that the layers which need one are called with."""
    seen = {}

    def listen(name):
        return lambda _layer, _args: seen.update({name: current_grid()})

    for name, layer in packed(transformer).items():
        if layer.needs_grid:
            layer.register_forward_pre_hook(listen(name))
    return seen


def packed(transformer):
    """Packed linears of the blocks, by name."""
    blocks = tuple(f"{name}." for name in family_of(transformer).block_lists)
    modules = transformer.named_modules()
    return {name: one for name, one in modules if isinstance(one, PackedLinear) and name.startswith(blocks)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Quantizes a tiny pipeline by a recipe, once, and loads it by diffusers' own from_pretrained."""
    done = {}

    def carry_out(model, recipe, *overrides):
        key = (model, recipe, overrides)
        if key not in done:
            call, sizes, grid = MODELS[model]
            out = tmp_path_factory.mktemp("run") / "out"
            report = quantize(
                tiny_pipeline(model), recipe=recipe, out=out, prompts=["a"], overrides=[*SMALL, *sizes, *overrides]
            )
            pipe = DiffusionPipeline.from_pretrained(out)
            pipe.set_progress_bar_config(disable=True)
            done[key] = SimpleNamespace(out=out, report=report, pipe=pipe, call=call, grid=grid)
        return done[key]

    return carry_out


@pytest.mark.parametrize("model", MODELS)
def test_a_loaded_checkpoint_quantizes_differences_from_local_means(run, model):
    result = run(model, "deltaquant-w4a4")
    assert not result.report.simulated
    assert inspect_checkpoint(result.out, verify=True).format_version == 4
    transformer = result.pipe.transformer
    family = family_of(transformer)
    grids = grids_seen(transformer)
    latents(result.pipe, result.call, num_inference_steps=1)
    seen, text = 0, 0
    for name, layer in packed(transformer).items():
        inner = name.split(".", 2)[2]
        if layer.scheme.activation is None:
            assert inner in family.modulation
        elif inner in family.text_linears:
            assert (layer.scheme.name, layer.needs_grid) == ("w4a4", False)
            text += 1
        else:
            assert layer.scheme.activation.delta == Delta(cube=(2, 2, 2))
            grid = grids[name]
            assert (grid.frames, grid.height, grid.width) == result.grid
            seen += 1
    assert seen > 0
    assert (text > 0) == (model != "cogvideox")
    for block in result.report.blocks:
        assert block.loss["final"] < float("inf")


def test_a_linear_of_a_joint_sequence_does_what_the_definition_says(run):
    layer = run("cogvideox", "deltaquant-w4a4").pipe.transformer.transformer_blocks[0].ff.net[2]
    grid = TokenGrid(frames=3, height=1, width=1, text_tokens=16, text="before")
    x = torch.randn(1, 19, layer.in_features, generator=torch.Generator().manual_seed(0))
    quantized = fake_quantize_input(x, layer.scheme.activation, grid=grid)
    expected = quantized @ layer.dequantized_weight(torch.float32).t() + layer.bias
    with token_grid(grid):
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    with token_grid(None):
        assert not torch.allclose(layer(x), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("recipe", ["deltaquant-w4a4", "q-vdit-w4a4"])
@pytest.mark.parametrize("model", MODELS)
def test_saved_again_and_copied_it_generates_the_same(run, model, recipe, tmp_path):
    more = ["distillation.epochs=2"] if recipe.startswith("q-vdit") else []
    result = run(model, recipe, *more)
    expected = latents(result.pipe, result.call)
    assert torch.isfinite(expected).all()
    assert torch.equal(latents(load_pipeline(result.out), result.call), expected)
    result.pipe.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(latents(again, result.call), expected)


def test_without_the_grid_it_would_generate_something_else_and_refuses_to(run):
    result = run("wan", "deltaquant-w4a4")
    expected, pipe = latents(result.pipe, result.call), load_pipeline(result.out)
    pipe.transformer._forward_pre_hooks.clear()
    pipe.transformer._forward_hooks.clear()
    with token_grid(None):
        assert not torch.allclose(latents(pipe, result.call), expected, rtol=0, atol=1e-3)
    with pytest.raises(UsageError, match="called outside its transformer"):
        latents(pipe, result.call)


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_with_estimators_sees_the_grid(run, model):
    result = run(model, "q-vdit-w4a4", "distillation.epochs=2")
    assert not result.report.simulated
    inspected = inspect_checkpoint(result.out, verify=True)
    assert inspected.storage["quantized_bytes"] == result.report.storage["quantized_bytes"]
    family = family_of(result.pipe.transformer)
    grids = grids_seen(result.pipe.transformer)
    latents(result.pipe, result.call, num_inference_steps=1)
    learned = {block.name for block in result.report.blocks if block.distillation["best_epoch"] > 0}
    assert learned or model != "cogvideox"
    for name, layer in packed(result.pipe.transformer).items():
        inner = name.split(".", 2)[2]
        assert layer.path.estimator == (layer.scheme.activation is not None)
        assert layer.path.estimator_frames == (None if inner in (*family.text_linears, *family.modulation) else 3)
        assert (name in grids) == layer.needs_grid
        if layer.needs_grid:
            assert grids[name].frames == 3
            moved = float((layer.estimator_frames - 1).abs().max()) > 0
            assert moved == (name.removesuffix(f".{inner}") in learned)
    for block in result.report.blocks:  # nothing but rounding to nearest stands between the student and what is packed
        assert block.loss["final"] == pytest.approx(block.loss["distilled"], rel=0.02)


def test_more_frames_than_were_calibrated_on(run):
    result = run("wan", "q-vdit-w4a4", "distillation.epochs=2")
    found = latents(result.pipe, result.call, num_frames=17)
    assert found.shape[2] == 5
    assert torch.isfinite(found).all()


@token_grid(TokenGrid(frames=3, height=2, width=4))
def test_the_gradient_of_a_checkpointed_block_is_the_same_where_tokens_have_places():
    """A part that asks where tokens lie is cut between cubes."""
    from diffusers.models.attention import FeedForward

    from s2q.nn import StudentInput

    scheme = load_recipe("deltaquant-w4a4").linear_scheme()
    torch.manual_seed(0)
    # a feed-forward, and a linear in a part that is no feed-forward, as those of an attention are
    block = torch.nn.ModuleDict({"ff": FeedForward(8, mult=2), "attn": torch.nn.Sequential(torch.nn.Linear(8, 8))})
    for place, name in ((block.ff.net[0], "proj"), (block.ff.net, "2"), (block.attn, "0")):
        linear = place.get_submodule(name)
        student = StudentLinear(linear, learns_clip=True, scheme=scheme, source=StudentInput(scheme.activation))
        setattr(place, name, student)
    x, found = torch.randn(1, 24, 8), []
    for recompute in (False, True):
        block.zero_grad(set_to_none=True)
        with memoization(), checkpoint_parts(block, piece=7, enabled=recompute):
            block.attn(block.ff(x)).square().sum().backward()
        found.append([parameter.grad for parameter in block.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_what_the_recipes_consist_of(width):
    ours, delta, estimated = (load_recipe(f"{name}-{width}") for name in ("s2q", "deltaquant", "q-vdit"))
    assert delta.description.startswith("experimental:")
    assert delta.linear_scheme().name == f"{width}d222"
    assert delta.linear_scheme(of_text=True).name == width
    assert (delta.distillation, delta.rounding.method, delta.transforms.rotation) == (None, "gptq", "identity")
    assert estimated.linear_scheme().name == width
    assert (estimated.transforms.estimator, estimated.clip.weights, estimated.rounding.method) == (True, True, "rtn")
    assert estimated.loss.temporal > 0
    for one in (delta, estimated):
        assert one.needs_grid
        assert one.calibrates
        assert one.calibration == replace(ours.calibration, selection="rtfp")
        assert one.modulation == ours.modulation
    assert not ours.needs_grid


def test_a_plan_counts_the_bytes_of_estimators(tmp_path):
    """Bytes of an estimator: α, β and a scale for each frame, for every linear that sees video."""
    plain, estimated = (plan("shapes-cogvideox", recipe=name) for name in ("rtn-w4a4", "q-vdit-w4a4"))
    frames = estimated.calibration.frames
    quantized = [one for one in estimated.layers if one.scheme == "w4a4"]
    more = sum(4 * (sum(one.shape) + frames) for one in quantized)
    assert estimated.storage["quantized_bytes"] == plain.storage["quantized_bytes"] + more
    assert not estimated.simulated
    delta = plan("shapes-cogvideox", recipe="deltaquant-w4a4")
    assert not delta.simulated
    assert delta.storage["quantized_bytes"] == plain.storage["quantized_bytes"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["activations.delta.cube=[2, 2]"], "activations.delta.cube"),
        (["activations.delta.cube=[2, 2, 0]"], "activations.delta.cube"),
        (["activations.delta.mean_bits=9"], "activations.delta.mean_bits"),
        (["activations.delta.cubes=[2, 2, 2]"], "cubes"),
        (["transforms.estimator=true"], "estimators need distillation"),
        (["loss.temporal=1"], "loss.temporal needs distillation"),
        (["loss.temporal=-1"], "loss.temporal"),
    ],
)
def test_recipes_that_are_not_valid(overrides, message):
    with pytest.raises(InvalidInputError, match=message):
        load_recipe("deltaquant-w4a4", overrides=overrides)


def test_a_resolved_recipe_comes_back(tmp_path):
    recipe = load_recipe("deltaquant-w4a4", overrides=["activations.delta.cube=[1, 4, 4]"])
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.resolved()))
    assert load_recipe(path) == recipe
    assert recipe.linear_scheme().activation.delta == Delta(cube=(1, 4, 4))


@pytest.mark.parametrize("recipe", ["deltaquant-w4a4", "q-vdit-w4a4"])
@pytest.mark.parametrize("model", ["cogvideox", "wan"])
def test_pipelines_that_share_components_generate_in_threads_what_they_do_alone(run, model, recipe):
    result = run(model, recipe, *(["distillation.epochs=2"] if recipe.startswith("q-vdit") else []))
    # Components with a state of their own: a tokenizer's padding is set by each call.
    stateful = ("scheduler", "tokenizer")
    own = [
        {**result.pipe.components, **{name: copy.deepcopy(result.pipe.components[name]) for name in stateful}}
        for _ in range(2)
    ]
    pipes = [type(result.pipe)(**components) for components in own]
    sizes = [result.call, {**result.call, "num_frames": 17}]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    wanted = [latents(pipe, call) for pipe, call in zip(pipes, sizes, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(latents, pipes, sizes))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["deltaquant-w4a4", "q-vdit-w4a4"])
def test_gradients_of_an_adapter_are_the_same_checkpointed_over_two_sizes(run, recipe):
    peft = pytest.importorskip("peft")
    result, found = run("cogvideox", recipe, *(["distillation.epochs=2"] if recipe.startswith("q-vdit") else [])), []
    for checkpointing in (False, True):
        transformer = load_pipeline(result.out).transformer.requires_grad_(False)
        torch.manual_seed(0)
        transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        transformer.train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        loss = torch.zeros(())
        for frames, height in ((3, 2), (5, 4)):
            inputs = transformer_inputs(seed=frames)
            inputs["hidden_states"] = torch.randn(1, frames, 4, height, 2, generator=torch.Generator().manual_seed(0))
            loss = loss + transformer(**inputs, return_dict=False)[0].square().mean()
        loss.backward()
        found.append([parameter.grad for parameter in transformer.parameters() if parameter.requires_grad])
    assert any(float(one.abs().max()) > 0 for one in found[0])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
