"""The recipes of other methods: what each does to a linear, coded again here, and the checkpoint that comes of it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from s2q.checkpoint import inspect_checkpoint, load_pipeline
from s2q.nn import set_backend
from s2q.planning import plan
from s2q.recipes.load import load_recipe
from s2q.rounding import GPTQ
from s2q.run.quantize import quantize
from tiny import run_pipeline, split_input, tiny_pipeline

PARTS = {
    "smoothquant": ("smooth", "identity", "rtn", None),
    "quarot": ("none", "hadamard", "gptq", 0.9),
    "vidit-q": ("smooth", "hadamard", "rtn", None),
    "svdquant": ("smooth", "identity", "gptq", None),
    "brecq": ("none", "identity", "adaround", None),
    "ptq4dit": ("smooth", "identity", "adaround", None),
}
METHODS = tuple(PARTS)
WIDTHS = ("w8a8", "w4a8", "w4a6", "w4a4")
LEARNED = ("brecq", "ptq4dit")
SMALL = ["calibration.n_prompts=1", "calibration.steps=1", "calibration.samples=1", "calibration.branches=both"]
LINEAR = "attn1.to_q"
SIBLINGS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Quantizes a tiny pipeline by a method at W4A4, once; gives what q reads and its weights before and after."""
    done = {}

    def run(method):
        if method not in done:
            out = tmp_path_factory.mktemp(method) / "out"
            pipe = tiny_pipeline("cogvideox", num_layers=1)
            block = pipe.transformer.transformer_blocks[0]
            amax = torch.zeros(block.get_submodule(LINEAR).in_features)
            inputs = []

            def look(_module, args):
                rows = args[0].reshape(-1, len(amax))
                inputs.append(rows.double())
                torch.maximum(amax, rows.abs().amax(dim=0), out=amax)

            block.get_submodule(LINEAR).register_forward_pre_hook(look)
            changes = [*SMALL, "distillation.epochs=2"] if method in LEARNED else SMALL
            report = quantize(pipe, recipe=f"{method}-w4a4", out=out, prompts=["a"], overrides=changes)
            loaded = load_pipeline(out)
            done[method] = SimpleNamespace(
                out=out,
                report=report,
                pipe=loaded,
                amax=amax.double(),
                inputs=inputs[0],  # the one denoising step, both branches of guidance
                weights=[block.get_submodule(name).weight.detach().double() for name in SIBLINGS],
                packed=loaded.transformer.transformer_blocks[0].get_submodule(LINEAR),
            )
        return done[method]

    return run


def smoothing(run, alpha=0.5):
    """max|x|^α / max|w|^(1-α), the weights those of q, k and v."""
    return run.amax**alpha / torch.cat(run.weights).abs().amax(dim=0) ** (1 - alpha)


def branch_of_weights(run, s, rank):
    """The top right singular vectors of the smoothed q, k and v, and what each of these makes of them."""
    smoothed = [weight * s for weight in run.weights]
    right = torch.from_numpy(np.linalg.svd(torch.cat(smoothed).numpy(), full_matrices=False)[2][:rank].T)
    return smoothed, right


def rotation(packed):
    return torch.kron(packed.transform_left.double(), packed.transform_right.double())


def rounded(weight):
    """4 bits, one step an output channel, a bfloat16 number."""
    step = (weight.abs().amax(dim=1, keepdim=True) / 7).bfloat16().double()
    return (weight / step).round() * step


def assert_rounded(packed, weight):
    """The packed weight is `weight` rounded to nearest, but for values that lie on the border between two codes."""
    difference = packed.dequantized_weight(torch.float32).double() - rounded(weight)
    assert float((difference.abs() < 1e-5 * weight.abs().amax()).double().mean()) > 0.999


def assert_hadamard(matrix):
    order = matrix.shape[0]
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5), rtol=2**-8, atol=0)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(order, dtype=torch.float64), rtol=0, atol=2**-7)


def test_smoothquant_divides_the_input_by_s_and_rounds_the_weight_times_s(baseline):
    run = baseline("smoothquant")
    s = smoothing(run)
    assert float(s.max() / s.min()) > 1.5
    torch.testing.assert_close(run.packed.transform_scale.double(), 1 / s, rtol=2**-8, atol=0)
    assert run.packed.transform_left is None
    assert_rounded(run.packed, run.weights[0] / run.packed.transform_scale.double())


def test_quarot_rotates_clips_and_rounds_by_gptq(baseline):
    run = baseline("quarot")
    signs, matrix = run.packed.transform_scale.double(), rotation(run.packed)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert_hadamard(matrix)
    assert float(run.packed.activation_clip) == pytest.approx(0.9)
    weight = (run.weights[0] * signs) @ torch.linalg.inv(matrix).t()
    step = weight.abs().amax(dim=1) / 7
    torch.testing.assert_close(run.packed.weight_scale.double(), step, rtol=2**-7, atol=0)
    packed = run.packed.dequantized_weight(torch.float32).double()
    assert not torch.allclose(packed, rounded(weight), rtol=0, atol=float(step.min()) / 2)
    errors = run.report.blocks[0].rounding[f"transformer_blocks.0.{LINEAR}"]
    assert errors["error"] < errors["rtn_error"]


def test_viditq_scales_then_rotates_and_rounds_to_nearest(baseline):
    run = baseline("vidit-q")
    scale, matrix = run.packed.transform_scale.double(), rotation(run.packed)
    torch.testing.assert_close(scale.abs(), 1 / smoothing(run), rtol=2**-8, atol=0)
    assert bool((scale < 0).any())
    assert_hadamard(matrix)
    assert run.packed.activation_clip is None
    assert_rounded(run.packed, (run.weights[0] / scale) @ torch.linalg.inv(matrix).t())


def test_svdquant_takes_the_singular_vectors_of_the_smoothed_weights_out_of_them(baseline):
    run = baseline("svdquant")
    s, rank = 1 / run.packed.transform_scale.double(), 64 // 12
    smoothed, right = branch_of_weights(run, s, rank)
    stored, left = run.packed.low_rank_basis.double(), run.packed.low_rank_weight.double()
    torch.testing.assert_close((right.t() @ stored).abs(), torch.eye(rank).double(), rtol=0, atol=0.05)  # float8
    torch.testing.assert_close(left @ right.t().matmul(stored).t(), smoothed[0] @ right, rtol=0.02, atol=0.02)
    rest = smoothed[0] - left @ stored.t()
    step = rest.abs().amax(dim=1) / 7
    torch.testing.assert_close(run.packed.weight_scale.double(), step, rtol=2**-7, atol=0)
    assert float(step.mean()) < 0.95 * float(smoothed[0].abs().amax(dim=1).mean()) / 7
    found = run.packed.dequantized_weight(torch.float32).double()
    assert not torch.allclose(found, rounded(rest), rtol=0, atol=float(step.min()) / 2)  # GPTQ
    errors = run.report.blocks[0].rounding[f"transformer_blocks.0.{LINEAR}"]
    assert errors["error"] < errors["rtn_error"]
    path = run.packed.path
    assert (path.low_rank, path.deflates, path.left, path.right) == (rank, False, None, None)
    assert torch.equal(stored, run.pipe.transformer.transformer_blocks[0].attn1.to_v.low_rank_basis.double())


def test_svdquant_smooths_by_the_alpha_whose_quantized_outputs_are_nearest(baseline):
    run = baseline("svdquant")
    x, errors, scales = run.inputs, [], []
    for alpha in np.linspace(0, 1, 11):
        s = smoothing(run, alpha)
        smoothed, right = branch_of_weights(run, s, 64 // 12)
        u = x / s
        quantized = rounded(u)
        outputs = [
            quantized @ rounded(one - one @ right @ right.t()).t() + u @ right @ (one @ right).t() for one in smoothed
        ]
        exact = [x @ weight.t() for weight in run.weights]
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(outputs, exact, strict=True)))
        scales.append(1 / s)
    found = [torch.allclose(scale, run.packed.transform_scale.double(), rtol=2**-8, atol=0) for scale in scales]
    assert sum(found) == 1
    assert errors[found.index(True)] < 1.05 * min(errors)
    assert max(errors) > 1.1 * min(errors)


def test_svdquant_gives_the_same_bits_on_the_cpu_backend(baseline):
    """Its checkpoint is of the newest format version, says what it is, and runs alike on both backends."""
    run = baseline("svdquant")
    assert inspect_checkpoint(run.out).format_version == 4
    x = run.inputs.float()
    outputs = {}
    for backend in ("reference", "cpu"):
        set_backend(run.pipe.transformer, backend)
        outputs[backend] = run.packed(x)
    set_backend(run.pipe.transformer, "auto")
    assert torch.equal(outputs["cpu"], outputs["reference"])
    plain = run.pipe.transformer.dequantize().transformer_blocks[0].get_submodule(LINEAR)
    quantized, branch = split_input(run.packed, x)
    expected = quantized @ run.packed.dequantized_weight(torch.float32).t() + branch + plain.bias
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)


def test_brecq_rounds_each_weight_down_or_up_as_serves_the_block(baseline):
    run = baseline("brecq")
    assert run.packed.transform_scale is None
    assert 0 < float(run.packed.activation_clip) < 1
    weight = run.weights[0]
    step = weight.abs().amax(dim=1, keepdim=True) / 7
    codes = run.packed.dequantized_weight(torch.float32).double() / step
    assert float(((codes - weight / step).abs() < 1 + 1e-4).double().mean()) == 1
    assert not torch.allclose(codes, (weight / step).round(), rtol=0, atol=0.5)
    assert run.report.blocks[0].loss["final"] < run.report.blocks[0].loss["initial"]


def test_ptq4dit_balances_the_salience_of_timesteps(tmp_path):
    """Of two timesteps, each of one sample; the maxima of each are listened to, and weighted as coded here."""
    pipe = tiny_pipeline("cogvideox", num_layers=1)
    linear = pipe.transformer.transformer_blocks[0].get_submodule(LINEAR)
    calls = []
    linear.register_forward_pre_hook(lambda _module, args: calls.append(args[0].abs().amax(dim=1).double()))
    changes = ["calibration.steps=2", "calibration.samples=2", "calibration.branches=both", "calibration.n_prompts=1"]
    changes += ["distillation.epochs=1", "calibration.selection=atop"]
    quantize(pipe, recipe="ptq4dit-w4a4", out=tmp_path / "out", prompts=["a"], overrides=changes)
    packed = load_pipeline(tmp_path / "out").transformer.transformer_blocks[0].get_submodule(LINEAR)
    timesteps = [one.amax(dim=0).numpy() for one in calls[:2]]  # collected with both branches in one call
    block = pipe.transformer.transformer_blocks[0]
    weight = torch.cat([block.get_submodule(name).weight.detach() for name in SIBLINGS]).abs().amax(dim=0).double()
    shares = [math.exp(-spearmanr(one, weight.numpy()).statistic) for one in timesteps]
    salience = sum(share * torch.from_numpy(one) for share, one in zip(shares, timesteps, strict=True)) / sum(shares)
    torch.testing.assert_close(packed.transform_scale.double(), (weight / salience).sqrt(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_checkpoint_loads_and_generates(baseline, method):
    run = baseline(method)
    inspected = inspect_checkpoint(run.out, verify=True)
    assert inspected.verified
    assert inspected.storage["quantized_bytes"] == run.report.storage["quantized_bytes"]
    assert torch.isfinite(run_pipeline(run.pipe)).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("method", METHODS)
def test_what_a_recipe_consists_of(method, width):
    recipe = load_recipe(f"{method}-{width}")
    transforms = recipe.transforms
    parts = (transforms.scale, transforms.rotation, recipe.rounding.method, recipe.clip.constant)
    *expected, clip = PARTS[method]
    assert parts == (*expected, None if width.endswith("a8") else clip)
    svd = method == "svdquant"
    assert transforms.scale == "none" or not transforms.learn_scale
    assert (transforms.alpha, transforms.low_rank) == (("search", 32) if svd else (0.5, 0))
    assert transforms.low_rank_from == ("weight" if svd else "input")
    assert transforms.salience == ("spearman" if method == "ptq4dit" else "max")
    assert (transforms.shift, recipe.refinement) == ("none", None)
    assert (recipe.outer is None) == (width == "w8a8")
    assert (recipe.distillation is not None) == recipe.clip.activations == (method in LEARNED)
    assert (recipe.loss.weighting, recipe.clip.weights) == ("uniform", False)
    assert recipe.linear_scheme().name == width
    assert recipe.modulation.num_bits == (8 if width == "w8a8" else 4)


@pytest.mark.parametrize("width", WIDTHS)
def test_methods_differ_in_the_method_alone(width):
    """Whatever is not the method is as in S²Q-VDiT's recipe, but for which samples are taken."""
    ours = load_recipe("s2q-w4a6")
    for method in (*METHODS, "q-dit", *(("vidit-q-mp",) if width != "w8a8" else ())):
        recipe = load_recipe(f"{method}-{width}")
        assert recipe.calibration == replace(ours.calibration, selection="rtfp")
        assert recipe.modulation.rounding == ours.modulation.rounding
        assert recipe.modulation_rounding == ours.modulation_rounding == GPTQ()


@pytest.mark.parametrize("width", WIDTHS)
def test_what_qdit_consists_of(width):
    recipe, bits = load_recipe(f"q-dit-{width}"), 8 if width == "w8a8" else 4
    assert (recipe.transforms.scale, recipe.transforms.rotation, recipe.rounding.method) == ("none", "identity", "gptq")
    assert (recipe.clip.constant, recipe.distillation, recipe.modulation.num_bits) == (None, None, bits)
    assert recipe.linear_scheme().name == f"w{bits}g128a{width[-1]}g128"
    assert recipe.linear_scheme().simulated
    assert (recipe.allocation.what, recipe.allocation.budget) == ("group_size", bits + 16 / 128)


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_mixed_precision_is_viditq_with_an_allocation(width):
    recipe, plain = load_recipe(f"vidit-q-mp-{width}"), load_recipe(f"vidit-q-{width}")
    own = {"name": recipe.name, "description": recipe.description, "allocation": recipe.allocation}
    assert recipe == plain.model_copy(update=own)
    allocation = recipe.allocation
    assert (allocation.what, allocation.candidates, allocation.budget) == ("weight_bits", (4, 8), 5)


def test_plans_of_all_of_them(tmp_path):
    """Each plans; bytes of the same bits differ by what the method stores."""
    tiny_pipeline("cogvideox").save_pretrained(tmp_path / "model")
    sizes = {
        (method, width): plan(tmp_path / "model", recipe=f"{method}-{width}").storage["quantized_bytes"]
        for method in METHODS
        for width in WIDTHS
    }
    for method in METHODS:
        assert sizes[method, "w8a8"] > sizes[method, "w4a8"]
        assert sizes[method, "w4a6"] == sizes[method, "w4a4"]
        clipped = load_recipe(f"{method}-w4a6").clip.constant is not None  # a number a linear, at 4 and 6 bits alone
        assert (sizes[method, "w4a6"] > sizes[method, "w4a8"]) == clipped
        assert (sizes[method, "w4a6"] == sizes[method, "w4a8"]) != clipped
    plain = plan(tmp_path / "model", recipe="rtn-w4a4").storage["quantized_bytes"]
    assert plain < sizes["smoothquant", "w4a4"] < sizes["vidit-q", "w4a4"] < sizes["quarot", "w4a4"]
    assert sizes["smoothquant", "w4a4"] < sizes["svdquant", "w4a4"]
    assert plain < sizes["brecq", "w4a4"] < sizes["smoothquant", "w4a4"] < sizes["ptq4dit", "w4a4"]
    assert sizes["smoothquant", "w4a4"] < sizes["vidit-q", "w4a4"] < sizes["quarot", "w4a4"]
