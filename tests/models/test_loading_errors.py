"""Why a pipeline cannot be loaded: each cause is told apart from the others, in one line with its own remedy."""

import json
import shutil
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from diffusers import DiffusionPipeline

from s2q.cli import run
from s2q.common import versions
from s2q.common.errors import InvalidInputError, ResourceError
from s2q.common.loading_errors import PACKAGES, loading_error, missing_package
from s2q.generation.load import check_model, load_pipeline
from s2q.models import resolve_model, source
from s2q.run.quantize import quantize
from tiny import tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_pipeline("wan").save_pretrained(root / "full")
    quantize(root / "full", recipe="rtn-w4a6", out=root / "packed")
    return root


@pytest.fixture(params=["full", "packed"])
def copy(request, folders, tmp_path):
    """A full-precision folder, and a checkpoint that diffusers saved again, so that no manifest finds the change."""
    folder = shutil.copytree(folders / request.param, tmp_path / "model")
    shutil.rmtree(folder / "s2q", ignore_errors=True)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("method", PACKAGES)
@pytest.mark.parametrize("verb", ["quantize", "load", "check"])
def test_a_missing_package_is_named_with_the_component_before_anything_is_loaded(
    folders, tmp_path, monkeypatch, method, verb
):
    folder = shutil.copytree(folders / "full", tmp_path / "model")
    edit(folder / "text_encoder/config.json", quantization_config={"quant_method": method})
    monkeypatch.setattr(source, "is_installed", lambda package: False)
    does = {
        "quantize": lambda: quantize(folder, recipe="rtn-w4a6", out=tmp_path / "out"),
        "load": lambda: load_pipeline(folder),
        "check": lambda: check_model(folder),
    }
    message = (
        f"its text_encoder is quantized by {method}, which needs .* not installed; pip install {PACKAGES[method]}$"
    )
    with pytest.raises(ResourceError, match=message):
        does[verb]()


def test_an_unknown_method_is_not_a_damaged_file(copy):
    edit(copy / "vae/config.json", quantization_config={"quant_method": "gguf-like"})
    with pytest.raises(InvalidInputError, match=r"quantized by a method that the installed .* do not know .*; upgrade"):
        load_pipeline(copy)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKLNone"]}, r"AutoencoderKLNone.*upgrade them"),
        ("model_index.json", {"text_encoder": ["transformers", "NoSuchModel"]}, r"NoSuchModel.*upgrade them"),
        ("model_index.json", {"vae": ["nosuchlibrary", "Thing"]}, r"nosuchlibrary"),
        ("model_index.json", {"scheduler": ["diffusers", "WanTransformer3DModel"]}, r"scheduler|config"),
        ("vae/config.json", {"base_dim": "many"}, r"is no configuration of AutoencoderKLWan|does not fit"),
        ("text_encoder/config.json", {"d_model": "many"}, r"(d_model|does not fit|cannot be loaded)"),
    ],
)
def test_a_wrong_component_is_one_line_and_no_defect(copy, name, changes, message, capsys):
    edit(copy / name, **changes)
    with pytest.raises((InvalidInputError, ResourceError), match=message) as caught:
        load_pipeline(copy)
    assert "\n" not in str(caught.value)
    command = ["generate", "-m", copy, "--prompt", "a", "-o", copy.parent / "out"]
    assert run([str(word) for word in command]) == caught.value.exit_code
    assert "a defect of s2q" not in capsys.readouterr().err


RAISED = [
    (ImportError("needs quanto (`pip install optimum-quanto`)"), ResourceError, "; pip install optimum-quanto"),
    (ModuleNotFoundError("No module named 'sdnq'", name="sdnq"), ResourceError, "; pip install sdnq"),
    (ImportError("Tok requires the SentencePiece library\nbut"), ResourceError, "; pip install SentencePiece"),
    (PackageNotFoundError("bitsandbytes"), ResourceError, "; pip install bitsandbytes"),
    (ImportError("cannot import name 'x'"), ResourceError, "not installed .*; install what it names"),
    (MemoryError(), ResourceError, "out of memory while it was loaded"),
    (torch.OutOfMemoryError("CUDA out of memory"), ResourceError, "out of memory while it was loaded"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ResourceError, "out of memory"),
    (OSError(12, "Cannot allocate memory"), ResourceError, "out of memory while it was loaded"),
    (TypeError("missing argument"), InvalidInputError, r"does not fit diffusers .* \(TypeError: missing argument\)"),
    (KeyError("_class_name"), InvalidInputError, "does not fit diffusers"),
    (ValueError("Unknown quantization type, got x"), InvalidInputError, "do not know"),
    (OSError("Error no file named x"), InvalidInputError, r"cannot be loaded .*\(Error no file named x\); "),
    (ResourceError("ours"), ResourceError, "^ours$"),
]


@pytest.mark.parametrize(("raised", "kind", "message"), RAISED, ids=[type(one).__name__ for one, *_ in RAISED])
def test_each_cause_has_its_own_error_and_remedy(copy, monkeypatch, raised, kind, message):
    def refuse(*_args, **_kwargs):
        raise raised

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    with pytest.raises(kind, match=message) as caught:
        load_pipeline(copy)
    assert "\n" not in str(caught.value)


def test_what_another_tool_needs_is_the_remedy_where_it_quantized_a_component(folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders / "full", tmp_path / "model")
    edit(
        folder / "text_encoder/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    monkeypatch.setattr(source, "is_installed", lambda package: True)

    def refuse(*_args, **_kwargs):
        raise RuntimeError("No GPU found. A GPU is needed for quantization.")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    with pytest.raises(InvalidInputError, match=r"\(No GPU found.*text_encoder is quantized by bitsandbytes: see"):
        resolve_model(folder).load_pipeline()


def test_a_package_is_named_as_pip_names_it():
    assert missing_package(ImportError("run pip install -U 'nvidia-modelopt[hf]'")) == "nvidia-modelopt[hf]"
    assert missing_package(ImportError("nothing known")) is None
    assert versions.is_installed("torch")
    assert not versions.is_installed("no-such-package-of-anyone")
    assert isinstance(loading_error(source.Path("x"), ImportError("y"), remedy="z"), ResourceError)
