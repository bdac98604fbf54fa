"""LoRA adapters that are fused into the model before it is quantized, and those that are refused."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import s2q
from loras import TARGETS, save_lora
from s2q.common.errors import InvalidInputError, UsageError
from s2q.models import ModelSource, resolve_model
from s2q.models.lora import parse_lora, with_loras
from tiny import tiny_pipeline

PREFIX = "transformer."


def expected_weights(plain, file, scale, *, alpha=4, rank=2):
    """W + s · alpha / r · B A, by hand."""
    factors = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(file).items()}
    weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for name in [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]:
        change = factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
        weights[f"{name}.weight"] += scale * alpha / rank * change
    return weights


@pytest.fixture(params=["cogvideox", "wan", "hunyuanvideo", "ltx", "mochi"])
def model(request, tmp_path):
    pipe = tiny_pipeline(request.param)
    pipe.save_pretrained(tmp_path / "model")
    return pipe, tmp_path / "model"


def test_an_adapter_is_added_to_the_weights(model, tmp_path):
    pipe, folder = model
    file = save_lora(pipe, tmp_path / "lora")
    source = with_loras(resolve_model(folder), [f"{file}:0.5"])
    fused = source.load_pipeline(dtype="float32").transformer.state_dict()
    plain = resolve_model(folder).load_pipeline(dtype="float32").transformer
    expected = expected_weights(plain, file, 0.5)
    assert fused.keys() == expected.keys()
    for name, tensor in fused.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    changed = [name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, fused[name])]
    assert changed
    assert all(any(f"{target}.weight" in name for target in TARGETS) for name in changed)


@pytest.fixture
def wan(tmp_path):
    pipe = tiny_pipeline("wan 2.2 a14b")
    pipe.save_pretrained(tmp_path / "model")
    return pipe, tmp_path / "model"


def test_each_transformer_of_a_pair_has_its_adapter(wan, tmp_path):
    pipe, folder = wan
    first = save_lora(pipe, tmp_path / "high", seed=1)
    second = save_lora(pipe, tmp_path / "low", seed=2, component="transformer_2")
    source = with_loras(resolve_model(folder), [str(first.parent), f"transformer_2={second}:2"])
    fused, plain = source.load_pipeline(dtype="float32"), resolve_model(folder).load_pipeline(dtype="float32")
    for component, file, scale in (("transformer", first, 1.0), ("transformer_2", second, 2.0)):
        weights = getattr(fused, component).state_dict()
        for name, tensor in expected_weights(getattr(plain, component), file, scale).items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_is_quantized_with_the_adapter_and_the_report_lists_it(wan, tmp_path):
    pipe, folder = wan
    file = save_lora(pipe, tmp_path / "lora")
    report = s2q.quantize(folder, recipe="rtn-w8a8", out=tmp_path / "out", loras=[f"{file}:0.5"])
    (lora,) = report.loras
    assert (lora["file"], lora["scale"], lora["component"]) == (file.name, 0.5, "transformer")
    assert f"`{file.name}` at scale 0.5" in (tmp_path / "out" / "README.md").read_text()

    fused = with_loras(resolve_model(folder), [f"{file}:0.5"]).load_pipeline(dtype="float32")
    by_hand = s2q.quantize(fused, recipe="rtn-w8a8", out=tmp_path / "by-hand")
    assert by_hand.loras == ()
    for component in ("transformer", "transformer_2"):
        name = f"{component}/diffusion_pytorch_model.safetensors"
        ours, theirs = load_file(tmp_path / "out" / name), load_file(tmp_path / "by-hand" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    settings = {"prompts": ["a"], "seeds": [0], "num_inference_steps": 2, "num_frames": 5, "height": 16, "width": 16}
    with pytest.raises(InvalidInputError, match=r"was quantized with LoRA .* at scale 0.5, the reference .* with none"):
        s2q.evaluate(tmp_path / "out", reference=folder, **settings)
    with pytest.raises(InvalidInputError, match=r"with none; pass|at scale 1; pass the same with --lora"):
        s2q.evaluate(tmp_path / "out", reference=folder, loras=[file], **settings)
    result = s2q.evaluate(tmp_path / "out", reference=folder, loras=[f"{file}:0.5"], **settings)
    assert result["metrics"]["velocity_relative_error"]["mean"] < 0.01


def test_a_run_with_another_adapter_does_not_resume(wan, tmp_path):
    from s2q.recipes.load import load_recipe
    from s2q.run.finished import run_inputs

    pipe, folder = wan
    file = save_lora(pipe, tmp_path / "lora")
    source, recipe = resolve_model(folder), load_recipe("rtn-w8a8")
    copy, other = shutil.copy(file, tmp_path / "copy.safetensors"), save_lora(pipe, tmp_path / "other", seed=1)

    def inputs(*loras):
        return run_inputs(with_loras(source, [str(lora) for lora in loras]), recipe, None, {})

    assert inputs(file) not in (inputs(), inputs(f"{file}:0.9"), inputs(other))
    assert inputs(file) == inputs(copy)
    assert inputs(file, other) == inputs(other, file)


def test_the_order_of_adapters_changes_no_bit(wan, tmp_path):
    pipe, folder = wan
    loras = [f"{save_lora(pipe, tmp_path / str(seed), seed=seed)}:0.37" for seed in range(3)]
    forwards, backwards = (
        with_loras(resolve_model(folder), given).load_pipeline(dtype="bfloat16").transformer.state_dict()
        for given in (loras, loras[::-1])
    )
    assert all(torch.equal(tensor, backwards[name]) for name, tensor in forwards.items())


@pytest.fixture
def cogvideox(tmp_path):
    pipe = tiny_pipeline("cogvideox")
    pipe.save_pretrained(tmp_path / "model")
    return pipe, tmp_path / "model"


def edited(file, change):
    """Save an adapter again, its tensors changed by a function of their dict."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


def test_a_transformer_is_built_once_for_all_its_adapters(wan, tmp_path, monkeypatch):
    pipe, folder = wan
    loras = [str(save_lora(pipe, tmp_path / str(seed), seed=seed)) for seed in range(2)]
    build, built = ModelSource.meta_transformer, []
    monkeypatch.setattr(
        ModelSource, "meta_transformer", lambda self, component: built.append(component) or build(self, component)
    )
    with_loras(resolve_model(folder), loras)
    assert built == ["transformer"]


def widen(tensors):
    name = next(name for name in tensors if name.endswith(".lora_A.weight"))
    tensors[name] = torch.cat([tensors[name]] * 2, dim=1)


def test_adapters_of_other_models_are_refused(cogvideox, tmp_path):
    pipe, folder = cogvideox
    file, source = save_lora(pipe, tmp_path / "lora"), resolve_model(folder)
    wider = edited(save_lora(pipe, tmp_path / "wider"), widen)
    deeper = save_lora(tiny_pipeline("cogvideox", num_layers=3), tmp_path / "deeper")
    for other, difference in ((wider, r"\d+ (input|output) features, not \d+"), (deeper, r"has no linear .*blocks\.2")):
        with pytest.raises(InvalidInputError, match=f"is for another model than .*{difference}"):
            with_loras(source, [str(other)])
    with pytest.raises(InvalidInputError, match="has no transformer_2"):
        with_loras(source, [f"transformer_2={file}"])

    def rename(tensors):
        tensors["text_encoder.q.lora_A.weight"] = tensors.pop(next(iter(tensors)))

    with pytest.raises(
        InvalidInputError, match=r"text_encoder\.q\.lora_A\.weight is not a factor of a linear of a transformer"
    ):
        with_loras(source, [str(edited(file, rename))])


def test_a_dora_is_refused(cogvideox, tmp_path):
    pipe, folder = cogvideox
    file = save_lora(pipe, tmp_path / "lora")
    dora = edited(file, lambda tensors: tensors.update({"transformer.x.lora_magnitude_vector": torch.ones(2)}))
    with pytest.raises(InvalidInputError, match="is a DoRA"):
        with_loras(resolve_model(folder), [str(dora)])


def test_a_quantized_model_is_refused(cogvideox, tmp_path):
    pipe, folder = cogvideox
    file = save_lora(pipe, tmp_path / "lora")
    s2q.quantize(folder, recipe="rtn-w8a8", out=tmp_path / "out")
    with pytest.raises(InvalidInputError, match="is quantized, so an adapter cannot be fused"):
        with_loras(resolve_model(tmp_path / "out"), [str(file)])
    with pytest.raises(UsageError, match="fuse them into the pipeline by fuse_lora"):
        s2q.quantize(pipe, recipe="rtn-w8a8", out=tmp_path / "other", loras=[file])
    with pytest.raises(InvalidInputError, match="pass a list of paths"):
        s2q.quantize(folder, recipe="rtn-w8a8", out=tmp_path / "other", loras=str(file))


def test_files_and_scales(tmp_path):
    file = tmp_path / "a=b:c.safetensors"
    save_file({"transformer.x.lora_A.weight": torch.ones(1, 1)}, file)
    assert (parse_lora(str(file)).path, parse_lora(str(file)).scale) == (file, 1.0)
    assert parse_lora(f"{file}:-0.25").scale == -0.25
    assert parse_lora(f"transformer_2={file}:1e-1").component == "transformer_2"
    assert parse_lora(str(file)).sha256 == parse_lora(f"{file}:3").sha256
    for text, error, message in (
        (f"{file}:half", UsageError, "got the scale 'half'"),
        (f"{file}:nan", UsageError, "got the scale 'nan'"),
        (f"transformer_3={file}", InvalidInputError, "transformer_3"),
        (str(tmp_path / "missing.safetensors"), InvalidInputError, "does not exist"),
        (str(tmp_path), InvalidInputError, "pytorch_lora_weights.safetensors does not exist"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            parse_lora(text)
    pickle = tmp_path / "lora.bin"
    pickle.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(InvalidInputError, match=r"lora\.bin"):
        parse_lora(str(pickle))
    empty = tmp_path / "empty.safetensors"
    save_file({}, empty)
    with pytest.raises(InvalidInputError, match="contains no tensors"):
        parse_lora(str(empty))


@pytest.fixture
def small_wan(tmp_path):
    """The source of a tiny Wan, and a file with an adapter in the layout of the published checkpoints."""
    tiny_pipeline("wan").save_pretrained(tmp_path / "model")
    source = resolve_model(tmp_path / "model")
    width = source.meta_transformer().blocks[0].attn1.to_q.in_features
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for block in range(len(source.meta_transformer().blocks)):
        for linear in ("q", "k", "v", "o"):
            name = f"diffusion_model.blocks.{block}.self_attn.{linear}"
            factors[f"{name}.lora_down.weight"] = torch.randn(2, width, generator=generator) / 8
            factors[f"{name}.lora_up.weight"] = torch.randn(width, 2, generator=generator) / 8
            factors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(factors, tmp_path / "original.safetensors")
    return source, tmp_path / "original.safetensors"


def test_the_layout_of_published_adapters_is_fused_with_its_alpha(small_wan):
    source, file = small_wan
    stored = load_file(file)
    plain = source.load_pipeline(dtype="float32").transformer.blocks[0].attn1.to_k.weight
    fused = with_loras(source, [f"{file}:0.5"]).load_pipeline(dtype="float32").transformer.blocks[0].attn1.to_k.weight
    name = "diffusion_model.blocks.0.self_attn.k"
    change = 0.5 * 4.0 / 2 * stored[f"{name}.lora_up.weight"] @ stored[f"{name}.lora_down.weight"]
    torch.testing.assert_close(fused, plain + change, rtol=1e-5, atol=1e-6)


BESIDE = {
    "diffusion_model.blocks.0.norm3.diff": True,
    "diffusion_model.blocks.0.self_attn.norm_q.diff": True,
    "diffusion_model.time_projection.1.diff_b": True,
    "diffusion_model.blocks.0.self_attn.q.diff_b": False,
}
"""Tensors beside the factors, and whether diffusers leaves them out."""


@pytest.mark.parametrize(("name", "left_out"), BESIDE.items())
def test_changes_beside_the_factors_are_kept_or_refused(small_wan, name, left_out):
    source, file = small_wan
    width = source.meta_transformer().blocks[0].attn1.to_q.in_features
    with_loras(source, [str(edited(file, lambda tensors: tensors.update({name: torch.zeros(width)})))])
    changed = edited(file, lambda tensors: tensors.update({name: torch.linspace(-1, 1, width)}))
    if left_out:
        with pytest.raises(InvalidInputError, match=rf"leave out its tensor {re.escape(name)}.* applied in part"):
            with_loras(source, [str(changed)])
    else:
        with_loras(source, [str(changed)])


def without_a_factor(tensors):
    del tensors[next(name for name in tensors if name.endswith(".lora_B.weight"))]


def of_two_ranks(tensors):
    name = next(name for name in tensors if name.endswith(".lora_A.weight"))
    tensors[name] = torch.cat([tensors[name]] * 2)


def with_nan(tensors):
    next(iter(tensors.values()))[0, 0] = float("nan")


def of_a_norm(tensors):
    tensors["transformer.transformer_blocks.0.norm1.norm.lora_A.weight"] = torch.ones(2, 64)
    tensors["transformer.transformer_blocks.0.norm1.norm.lora_B.weight"] = torch.ones(64, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_factor, "has only the factor A.weight, so it would be applied in part"),
        (of_two_ranks, "have shapes"),
        (with_nan, "contains NaN or infinite values"),
        (of_a_norm, "has no linear transformer_blocks.0.norm1.norm"),
    ],
)
def test_adapters_that_are_not_whole_are_refused(cogvideox, tmp_path, change, message):
    pipe, folder = cogvideox
    file = edited(save_lora(pipe, tmp_path / "lora"), change)
    with pytest.raises(InvalidInputError, match=message):
        with_loras(resolve_model(folder), [str(file)])


def test_a_file_that_changes_after_the_check_is_refused(cogvideox, tmp_path):
    pipe, folder = cogvideox
    file = save_lora(pipe, tmp_path / "lora")
    source = with_loras(resolve_model(folder), [str(file)])
    edited(file, lambda tensors: tensors.update({name: tensor * 2 for name, tensor in tensors.items()}))
    with pytest.raises(InvalidInputError, match="has changed since it was checked"):
        source.load_pipeline()


def test_a_relative_path_is_kept_for_workers_in_other_folders(cogvideox, tmp_path, monkeypatch):
    pipe, folder = cogvideox
    save_lora(pipe, tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    (lora,) = with_loras(resolve_model(folder), ["lora:0.5"]).loras
    monkeypatch.chdir("/")
    assert parse_lora(str(lora)) == lora


@pytest.mark.slow
def test_a_comparison_has_the_adapter_on_both_sides(cogvideox, tmp_path, monkeypatch):
    from s2q.comparison import pages

    monkeypatch.setattr("s2q.report.video.encode_mp4", lambda frames, **_: b"")
    monkeypatch.setattr(pages, "write_mp4", lambda path, frames, fps: path.write_bytes(b""))
    pipe, folder = cogvideox
    file = save_lora(pipe, tmp_path / "lora")
    s2q.quantize(folder, recipe="rtn-w8a8", out=tmp_path / "adapted", loras=[f"{file}:0.5"])
    arguments = {"model": folder, "prompts": ["a"], "seeds": [0], "num_inference_steps": 1, "num_frames": 9}
    arguments |= {"height": 16, "width": 16, "metrics": ["velocity"], "out": tmp_path / "comparison"}
    with pytest.raises(InvalidInputError, match="was quantized with LoRA"):
        s2q.compare([str(tmp_path / "adapted")], dry_run=True, **arguments)
    entries = [str(tmp_path / "adapted"), "rtn-w8a8"]
    result = s2q.compare(entries, loras=[f"{file}:0.5"], **arguments)
    errors = [entry["metrics"]["velocity_relative_error"]["mean"] for entry in result["entries"]]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)
    assert errors[0] < 0.01
    assert f"--lora {file}:0.5" in (tmp_path / "comparison/index.html").read_text()


def test_plan_checks_adapters(cogvideox, tmp_path, capsys):
    from s2q.cli import run

    pipe, folder = cogvideox
    file = save_lora(pipe, tmp_path / "lora")
    assert run(["plan", "-m", str(folder), "-r", "rtn-w8a8", "--lora", str(file)]) == 0
    assert run(["plan", "-m", str(folder), "-r", "rtn-w8a8", "--lora", str(edited(file, without_a_factor))]) == 3
    assert "applied in part" in capsys.readouterr().err
    assert run(["plan", "-m", "synthetic:wan-1.3b", "-r", "rtn-w8a8", "--lora", str(file)]) == 2
    assert "needs the model's files" in capsys.readouterr().err
