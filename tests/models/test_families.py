"""What every family has to show, on a tiny random pipeline of its classes; a new one is a line in a table."""

import pytest
import torch
import torch.nn.functional as F

import s2q
from quick import quick
from s2q.calibration.stream import TeacherStream
from s2q.checkpoint import file_tensors, read_config
from s2q.distillation.token_importance import capture_column_sums
from s2q.evaluation.evaluate import evaluate
from s2q.generation.conditioning import image_to_video
from s2q.generation.settings import resolve_settings
from s2q.generation.trajectory import prediction_of, record_trajectory
from s2q.models import FAMILIES, block_linears, block_names, family_of
from s2q.nn import PackedLinear
from s2q.planning import plan
from tiny import prompts_for, prompts_of_a_call, reloaded, tiny_call, tiny_pipeline, video_size
from tiny_families import TEXT_TO_VIDEO

# All but CogVideoX without rotary embeddings, which most other tests take, and a pipeline of two transformers
# (test_two_transformers.py).
FAMILIES_UNDER_TEST = [name for name in TEXT_TO_VIDEO if name not in ("cogvideox", "wan 2.2 a14b")]
FAMILIES_UNDER_TEST += ["wan-animate image"]  # has no text to video
OF_IMAGES = {"attn2.add_k_proj", "attn2.add_v_proj"}  # which text to video has none of: test_image_to_video.py
WITH_SOFTMAX = [name for name in FAMILIES_UNDER_TEST if name != "sana-video"]
"""Sums of linear attention: distillation/test_token_importance.py."""
WHOLE_RUNS = quick(FAMILIES_UNDER_TEST, "wan", "hunyuanvideo 1.5", "mochi", "ltx-2", "wan-animate image")
"""Families of a whole run; checkpoint/test_dtype.py quantizes and runs each of them."""

QUICK = ["calibration.samples=3", "calibration.steps=2", "distillation.epochs=1"]


@pytest.fixture(scope="module", params=FAMILIES_UNDER_TEST)
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture(scope="module")
def trajectory(pipe):
    requested = {**video_size(pipe), "num_inference_steps": 3}
    family = family_of(pipe.transformer)
    if family.guidance != "embedded" and family.defaults["guidance_scale"] == 1:
        requested["guidance_scale"] = 3.0  # both branches, where the model is published with one
    settings = resolve_settings(pipe, requested=requested)
    prompts = prompts_of_a_call(pipe)
    return record_trajectory(pipe, prompts, seeds=range(len(prompts)), settings=settings, decode=True)


@pytest.fixture(scope="module")
def stream(pipe, trajectory, tmp_path_factory):
    """The teacher's stream on the last row of every call."""
    family = family_of(pipe.transformer)
    calls = [
        lambda call=call: {
            name: value if name in family.unbatched else _row(value, len(call.output))
            for name, value in call.inputs.items()
        }
        for call in trajectory.calls
    ]
    return TeacherStream(
        pipe.transformer,
        block_names(pipe.transformer, family),
        calls=calls,
        names=[f"step {step}" for step in range(len(calls))],
        steps=range(len(calls)),
        family=family,
        folder=tmp_path_factory.mktemp("stream"),
    )


def _row(value, rows):
    return value[-1:] if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows else value


def test_every_family_is_tested():
    names = {family.name for family in FAMILIES.values()}
    tested = [name.removesuffix(" image") for name in FAMILIES_UNDER_TEST]
    assert names == {name if name in names else name.split()[0] for name in tested}


def test_every_linear_of_the_blocks_is_listed_and_none_outside(pipe):
    family = family_of(pipe.transformer)
    prefixes = tuple(f"{name}." for name in family.block_lists)
    inside = {
        name
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(prefixes) and not _is_kept(name, family)
    }
    listed = block_linears(pipe.transformer, family)
    assert {one.name for one in listed} == inside
    roles = {one.name.split(".", 2)[2]: one.role for one in listed}
    assert {name for name, role in roles.items() if role == "modulation"} == set(family.modulation)
    shared = [name for group in family.shared_inputs for name in group]
    assert len(shared) == len(set(shared))
    assert set(shared) - OF_IMAGES <= {name for name, role in roles.items() if role == "linear"}


def _is_kept(name, family):
    return any(name.endswith(f".{kept}") for kept in family.kept_linears)


def test_linears_of_a_group_read_the_same_numbers(pipe, stream):
    family = family_of(pipe.transformer)
    for index, name in enumerate(stream.block_names):
        stream.advance(index)
        block, heard = pipe.transformer.get_submodule(name), {}
        handles = [
            module.register_forward_pre_hook(
                lambda _module, args, inner=inner, heard=heard: heard.update({inner: args[0]})
            )
            for inner, module in block.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        with torch.no_grad():
            block(**stream.inputs(0))
        for handle in handles:
            handle.remove()
        for first, *others in family.shared_inputs:
            for other in others:
                assert (first in heard) == (other in heard)
                assert first not in heard or torch.equal(heard[first], heard[other])


@torch.no_grad()
def test_replaying_a_call_gives_its_recorded_output(pipe, trajectory):
    """Both branches of guidance in one call, whether the pipeline runs them so or not."""
    assert trajectory.frames.shape == (len(trajectory.prompts), *video_size(pipe).values(), 3)
    assert len(trajectory.calls) == 3
    for call in trajectory.calls:
        assert len(call.output) == len(trajectory.prompts) * trajectory.branches(call)
        torch.testing.assert_close(prediction_of(pipe.transformer(**call.inputs, return_dict=False)), call.output)


def test_the_unconditional_rows_come_first(pipe, trajectory):
    """The rows of the prompts differ from prompt to prompt; those without a prompt are all alike."""
    call = trajectory.calls[0]
    if trajectory.branches(call) == 1:
        pytest.skip("guidance is distilled")
    unconditional, conditional = call.inputs["encoder_hidden_states"].chunk(2)
    torch.testing.assert_close(unconditional[0], unconditional[-1])
    assert not torch.equal(conditional[0], conditional[-1] if len(trajectory.prompts) > 1 else unconditional[0])
    first, second = (one.inputs["encoder_hidden_states"] for one in trajectory.calls[:2])
    assert first is second


@torch.no_grad()
def test_blocks_run_on_the_stream_as_they_do_in_the_transformer(pipe, trajectory, stream):
    """With nothing quantized a block gives, bit for bit, what it gives inside the model."""
    names, outputs = stream.block_names, {}
    handles = [
        pipe.transformer.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: outputs.update({name: output})
        )
        for name in names
    ]
    pipe.transformer(**stream.calls[1](), return_dict=False)
    for handle in handles:
        handle.remove()
    expected = dict(outputs)
    for index, name in enumerate(names):
        stream.advance(index)
        found = pipe.transformer.get_submodule(name)(**stream.inputs(1))
        for one, other in zip(_streams(found), _streams(expected[name]), strict=True):
            assert torch.equal(one, other)


def _streams(output):
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("pipe", WITH_SOFTMAX, indirect=True)
def test_token_importance_is_that_of_the_explicit_map(pipe, stream, monkeypatch):
    family, explicit = family_of(pipe.transformer), []

    def by_hand(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_rest):
        logits = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
        attention = (logits if attn_mask is None else logits + attn_mask).softmax(-1)
        attention = attention.nan_to_num()  # of a query that may see no key
        if query.shape[-2] == key.shape[-2]:
            explicit.append(attention.sum(dim=(1, 2)))
        return attention @ value

    for index, name in enumerate(stream.block_names):
        stream.advance(index)
        block, inputs = pipe.transformer.get_submodule(name), stream.inputs(0)
        with torch.no_grad(), capture_column_sums(block.get_submodule(family.attention)) as captured:
            output = block(**inputs)
        explicit.clear()
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(F, "scaled_dot_product_attention", by_hand)
            block(**inputs)
        torch.testing.assert_close(captured.joined(), explicit[0], rtol=1e-4, atol=1e-5)
        lengths = dict(zip(stream.streams, (part.shape[1] for part in _streams(output)), strict=True))
        left_out = sum(lengths[name] for name in family.joint_order) - captured.joined().shape[1]
        assert (left_out > 0) == (family.name == "mochi")  # which leaves out the text that a prompt does not fill


@pytest.mark.parametrize("pipe", WHOLE_RUNS, indirect=True)
def test_from_plan_to_video(pipe, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    pipe.save_pretrained(model)
    overrides = QUICK + [f"calibration.{name}={value}" for name, value in video_size(pipe).items()]
    planned = plan(str(model), recipe="s2q-w4a6", overrides=overrides)
    prompts = prompts_for(pipe, "red", "a blue square")
    report = s2q.quantize(str(model), recipe="s2q-w4a6", out=out, prompts=prompts, overrides=overrides)
    assert all(block.attention["map"] for block in report.blocks), "each family's calls define where a token is"
    assert set(read_config(out).layers) == {layer.name for layer in planned.layers}
    loaded = reloaded(out)
    loaded.set_progress_bar_config(disable=True)
    state = file_tensors(loaded.transformer).values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in state) == planned.storage["quantized_bytes"]
    if image_to_video(pipe) is None:  # test_image_to_video.py has the others
        frames = loaded("red", **tiny_call(loaded), output_type="pt").frames
        size = video_size(pipe)
        assert frames.shape == (1, size["num_frames"], 3, size["height"], size["width"])
        assert bool(frames.isfinite().all())
    options = {**video_size(pipe), "num_inference_steps": 2}
    result = evaluate(str(out), reference=str(model), prompts=prompts, seeds=[0], **options)
    assert 0 < result["metrics"]["velocity_relative_error"]["mean"] < 0.5


@pytest.mark.parametrize("pipe", WHOLE_RUNS, indirect=True)
def test_linears_outside_the_blocks_are_quantized_where_the_recipe_says_so(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    overrides = ["outer.num_bits=8"]
    planned = plan(str(tmp_path / "model"), recipe="rtn-w4a16", overrides=overrides)
    s2q.quantize(tmp_path / "model", recipe="rtn-w4a16", out=tmp_path / "out", overrides=overrides)
    loaded = reloaded(tmp_path / "out")
    linears = {name for name, one in loaded.transformer.named_modules() if isinstance(one, torch.nn.Linear)}
    packed = {name for name, one in loaded.transformer.named_modules() if isinstance(one, PackedLinear)}
    kept = set(getattr(loaded.transformer, "_keep_in_fp32_modules", None) or ())
    family = family_of(loaded.transformer)
    untouched = {name for name in linears if name in family.latent_linears or _is_kept(name, family)}
    adaptive = {linear.name for linear in block_linears(loaded.transformer, family) if linear.role == "modulation"}
    assert linears - packed == untouched | {name for name in linears - adaptive if kept & set(name.split("."))}
    state = file_tensors(loaded.transformer).values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in state) == planned.storage["quantized_bytes"]
    pipes, found = {"outer": loaded}, {}
    s2q.quantize(tmp_path / "model", recipe="rtn-w4a16", overrides=["outer=null"], out=tmp_path / "blocks")
    pipes["blocks"] = reloaded(tmp_path / "blocks")
    for name, one in pipes.items():
        settings = resolve_settings(one, requested={**video_size(one), "num_inference_steps": 2})
        found[name] = record_trajectory(one, prompts_for(one, "red"), seeds=[0], settings=settings).calls[0].output
    assert float((found["outer"] - found["blocks"]).norm() / found["blocks"].norm()) < 0.05
