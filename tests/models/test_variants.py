"""The files that s2q reads of a pipeline are those that diffusers loads: by index and variant, in every situation."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from s2q.common.errors import InvalidInputError
from s2q.models import resolve_model
from s2q.planning import plan
from s2q.run.quantize import quantize
from tiny import tiny_pipeline

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
MODELS = ("transformer", "vae", "text_encoder")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of random pipelines, each of other weights, by how they were saved."""
    root = tmp_path_factory.mktemp("saved")
    how = {
        "fp32": (torch.float32, {}),
        "fp32-shards": (torch.float32, {"max_shard_size": "30KB"}),
        "bf16": (torch.bfloat16, {}),
        "fp16-variant": (torch.float16, {"variant": "fp16"}),
        "fp16-variant-shards": (torch.float16, {"variant": "fp16", "max_shard_size": "15KB"}),
        "bf16-variant": (torch.bfloat16, {"variant": "bf16"}),
        "pickles": (torch.float32, {"safe_serialization": False}),
    }
    for seed, (name, (dtype, options)) in enumerate(how.items()):
        tiny_pipeline("cogvideox", seed, dtype=dtype).save_pretrained(root / name, **options)
    return root


def put(saved, folder, *names, components=MODELS):
    """Put the weights of saved pipelines into one folder, one save over the other."""
    if not folder.exists():
        shutil.copytree(saved / names[0], folder)
        names = names[1:]
    for name in names:
        for component in components:
            shutil.copytree(saved / name / component, folder / component, dirs_exist_ok=True)
    return folder


def plain(saved, folder):
    put(saved, folder, "bf16")


def shards(saved, folder):
    put(saved, folder, "fp32-shards")


def shards_over_a_stale_single_file(saved, folder):
    put(saved, folder, "bf16", "fp32-shards")


def shards_beside_a_variant(saved, folder):
    put(saved, folder, "fp32-shards", "fp16-variant")


def sharded_variant_beside_single_files(saved, folder):
    put(saved, folder, "fp32", "fp16-variant-shards")


def two_variants_without_plain_weights(saved, folder):
    put(saved, folder, "bf16-variant", "fp16-variant-shards")


def variant_of_the_transformer_alone(saved, folder):
    put(saved, folder, "fp32")
    put(saved, folder, "fp16-variant", components=("transformer",))


def variant_of_the_text_encoder_alone(saved, folder):
    put(saved, folder, "bf16")
    put(saved, folder, "fp16-variant-shards", components=("text_encoder",))


def stale_shards_without_an_index(saved, folder):
    put(saved, folder, "fp32-shards", "bf16")
    for component in MODELS:
        for index in (folder / component).glob("*.index.json"):
            index.unlink()


def stale_single_file_of_the_text_encoder(saved, folder):
    put(saved, folder, "fp32-shards")
    put(saved, folder, "bf16", components=("text_encoder",))  # transformers opens it before the index


def pickles_beside_safetensors(saved, folder):
    put(saved, folder, "pickles", "bf16")


def legacy_names_of_a_sharded_variant(saved, folder):
    put(saved, folder, "fp32", "fp16-variant-shards")
    transformer = folder / "transformer"
    old = transformer / INDEX.replace(".json", ".fp16.json")
    text = old.read_text()
    for path in transformer.glob("*.fp16-*.safetensors"):
        name = path.name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")
        text = text.replace(path.name, name)
        path.rename(transformer / name)
    old.unlink()
    (transformer / INDEX.replace(".index.json", ".fp16.index.json")).write_text(text)


def links_into_blobs_as_in_the_cache(saved, folder):
    shutil.copytree(put(saved, folder.with_name("source"), "bf16", "fp32-shards"), folder)
    for component in MODELS:
        for path in (folder / component).iterdir():
            blob = folder.with_name(f"{component}-{path.name}-blob")
            path.rename(blob)
            path.symlink_to(blob)


SITUATIONS = [
    (plain, None, torch.bfloat16),
    (shards, None, torch.float32),
    (shards_over_a_stale_single_file, None, torch.float32),
    (shards_beside_a_variant, None, torch.float32),
    (shards_beside_a_variant, "fp16", torch.float16),
    (sharded_variant_beside_single_files, None, torch.float32),
    (sharded_variant_beside_single_files, "fp16", torch.float16),
    (two_variants_without_plain_weights, "fp16", torch.float16),
    (two_variants_without_plain_weights, "bf16", torch.bfloat16),
    (variant_of_the_transformer_alone, "fp16", torch.float16),
    (variant_of_the_text_encoder_alone, "fp16", torch.bfloat16),
    (stale_shards_without_an_index, None, torch.bfloat16),
    (stale_single_file_of_the_text_encoder, None, torch.float32),
    (pickles_beside_safetensors, None, torch.bfloat16),
    (legacy_names_of_a_sharded_variant, "fp16", torch.float16),
    (links_into_blobs_as_in_the_cache, None, torch.float32),
]


@pytest.mark.parametrize(
    ("situation", "variant", "dtype"), SITUATIONS, ids=[f"{one.__name__}-{variant}" for one, variant, _ in SITUATIONS]
)
def test_files_dtype_and_sizes_are_those_that_diffusers_loads(saved, tmp_path, situation, variant, dtype):
    folder = tmp_path / "model"
    situation(saved, folder)
    source = resolve_model(folder, variant=variant)
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, variant=variant, use_safetensors=True)
    for component in MODELS:
        read = {name: one for path in source.weight_files(component) for name, one in load_file(path).items()}
        loaded = getattr(pipe, component).state_dict()
        assert read
        for name, tensor in read.items():
            assert torch.equal(loaded[name], tensor.float()), f"{component}: {name}"
    assert source.weights_dtype() is dtype
    files = [path for component in ("vae", "text_encoder") for path in source.weight_files(component)]
    assert sum(source.component_bytes().values()) == sum(path.stat().st_size for path in files)
    tensors = [one for path in source.weight_files("transformer") for one in load_file(path).values()]
    assert source.storage()["quantized_bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert source.load_pipeline().transformer.dtype is dtype


@pytest.mark.parametrize("verb", ["plan", "quantize"])
@pytest.mark.parametrize(
    ("names", "variant", "message"),
    [
        (
            ["fp16-variant"],
            None,
            r'has only weights of variant fp16; pass --variant fp16 \(variant="fp16" in Python',
        ),
        (
            ["bf16-variant", "fp16-variant"],
            None,
            "of variant bf16 and fp16; pass --variant bf16 or --variant fp16",
        ),
        (["fp16-variant"], "fp8", "no weights of variant 'fp8'; there are weights of variant fp16"),
        (["fp16-variant"], "fp1", "no weights of variant 'fp1' in safetensors; it has fp16"),
        (["fp32"], "fp16", "no weights of variant 'fp16'; it has no variants; remove it"),
        (["pickles"], None, r"has only pickled weights \(.*bin\).*safe_serialization=True"),
    ],
)
def test_weights_that_are_not_as_asked_for_are_refused_alike_before_compute(
    saved, tmp_path, verb, names, variant, message
):
    folder = put(saved, tmp_path / "model", *names)
    with pytest.raises(InvalidInputError, match=message) as caught:
        if verb == "plan":
            plan(folder, recipe="rtn-w4a6", variant=variant)
        else:
            quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out", variant=variant)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("component", MODELS)
def test_a_shard_that_is_missing_is_named(saved, tmp_path, component):
    folder = put(saved, tmp_path / "model", "fp32-shards")
    first, *_ = sorted((folder / component).glob("*.safetensors"))
    first.unlink()
    with pytest.raises(InvalidInputError, match=rf"{component}/.*index\.json: names {first.name}, which is missing"):
        resolve_model(folder)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}'],
)
def test_a_damaged_index_is_named(saved, tmp_path, content):
    folder = put(saved, tmp_path / "model", "fp32-shards")
    (folder / "transformer" / INDEX).write_text(content)
    with pytest.raises(InvalidInputError, match=r"transformer/diffusion_pytorch_model\.safetensors\.index\.json"):
        resolve_model(folder)


def test_configurations_alone_can_be_planned_but_not_loaded(saved, tmp_path):
    folder = put(saved, tmp_path / "model", "fp32-shards")
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    assert plan(folder, recipe="rtn-w4a6").layers
    assert resolve_model(folder).weights_dtype() is None
    assert resolve_model(folder).storage() is None
    with pytest.raises(InvalidInputError, match=r"\.safetensors: cannot be read"):
        resolve_model(folder).load_pipeline()


@pytest.mark.parametrize("component", MODELS)
def test_a_truncated_file_of_any_component_is_named(saved, tmp_path, component):
    folder = put(saved, tmp_path / "model", "bf16")
    (path,) = (folder / component).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InvalidInputError, match=rf"{component}/{path.name}: truncated"):
        resolve_model(folder).load_pipeline()


def test_a_file_without_a_suffix_is_named_where_diffusers_fails_on_it(saved, tmp_path):
    folder = put(saved, tmp_path / "model", "fp16-variant")
    (folder / "vae" / "LICENSE").write_text("")
    with pytest.raises(
        InvalidInputError, match="vae/LICENSE: diffusers finds no variant beside a file without a suffix"
    ):
        resolve_model(folder, variant="fp16")


def test_both_transformers_are_read_by_index_and_variant(tmp_path):
    tiny_pipeline("wan 2.2 a14b", boundary_ratio=0.5).save_pretrained(tmp_path, max_shard_size="50KB")
    half = tiny_pipeline("wan 2.2 a14b", 1, boundary_ratio=0.5, dtype=torch.bfloat16)
    half.transformer_2.save_pretrained(tmp_path / "transformer_2", variant="bf16")
    assert resolve_model(tmp_path).weights_dtype() is torch.float32
    source = resolve_model(tmp_path, variant="bf16")
    assert len(source.weight_files("transformer")) > 1
    assert [path.name for path in source.weight_files("transformer_2")] == [SINGLE.replace(".", ".bf16.", 1)]


def test_the_variant_is_recorded_and_its_weights_are_quantized(saved, tmp_path):
    folder = put(saved, tmp_path / "model", "fp32", "fp16-variant")
    for variant, dtype in ((None, "float32"), ("fp16", "float16")):
        out = tmp_path / f"out-{variant}"
        report = quantize(folder, recipe="rtn-w4a6", out=out, variant=variant)
        assert (report.source_variant, report.source_revision, report.dtype) == (variant, None, dtype)
        assert json.loads((out / "s2q/report.json").read_text())["source_variant"] == variant
    alone = put(saved, tmp_path / "alone", "fp16-variant")
    quantize(alone, recipe="rtn-w4a6", out=tmp_path / "out-alone", variant="fp16")
    ours, theirs = (load_file(tmp_path / name / "transformer" / SINGLE) for name in ("out-fp16", "out-alone"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_stale_files_are_told_at_debug_level(saved, tmp_path, caplog):
    folder = put(saved, tmp_path / "model", "bf16", "fp32-shards")
    with caplog.at_level("DEBUG", logger="s2q.common.weight_files"):
        resolve_model(folder)
    assert f"{INDEX} is loaded; ignored: {SINGLE}" in caplog.text
