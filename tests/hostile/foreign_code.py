"""Checkpoints that ask their loader to run code: by pickles, modules beside the files, names of modules, adapters."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

MODULES = ["evil_module", "evil_package.inner", "os", "antigravity", "pipeline_utils", "this", "subprocess"]
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


class RunsCode:
    """A pickle that writes a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return Path.touch, (self.canary,)


def source(canary: Path) -> str:
    """A module that writes a file when it is imported."""
    return f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass Model: pass\n"


class Folder:
    """A checkpoint to be changed, at a component."""

    def __init__(self, folder: Path, random_: random.Random, canary: Path) -> None:
        self.folder, self.random, self.canary = folder, random_, canary
        self.index = json.loads((folder / "model_index.json").read_text())
        self.component = random_.choice([name for name, entry in self.index.items() if isinstance(entry, list)])
        self.path = folder / self.component

    def edit_index(self, **changes: object) -> None:
        self.index.update(changes)
        (self.folder / "model_index.json").write_text(json.dumps(self.index))

    def edit_config(self, **changes: object) -> None:
        for path in self.path.glob("*config.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def write_module(self, path: Path) -> None:
        path.write_text(source(self.canary))

    def write_pickle(self, path: Path) -> None:
        path.write_bytes(pickle.dumps(RunsCode(self.canary)))


def pickle_alone(folder: Folder) -> None:
    """In place of the weights."""
    pickle_beside(folder)
    for weights in folder.path.glob("*.safetensors"):
        weights.unlink()


def pickle_beside(folder: Folder) -> None:
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "scheduler.pt", "tokenizer.pkl"):
        folder.write_pickle(folder.path / name)


def pickle_as_safetensors(folder: Folder) -> None:
    for weights in folder.path.glob("*.safetensors"):
        folder.write_pickle(weights)


def library(folder: Folder) -> None:
    """The index names a module."""
    class_name = folder.random.choice(["Model", "DiffusionPipeline", "system", "Popen"])
    folder.edit_index(**{folder.component: [folder.random.choice(MODULES), class_name]})


def module_beside(folder: Folder) -> None:
    library(folder)
    module, _ = folder.index[folder.component]
    folder.write_module(folder.path / f"{module}.py")
    folder.write_module(folder.path / "diffusers.py")
    folder.write_module(folder.path / "transformers.py")


def custom_pipeline(folder: Folder) -> None:
    folder.write_module(folder.folder / "pipeline.py")
    folder.write_module(folder.folder / "None.py")
    folder.edit_index(_class_name=folder.random.choice([["pipeline", "Model"], "pipeline", "None"]))


def auto_map(folder: Folder) -> None:
    folder.write_module(folder.path / "modeling.py")
    names = ("AutoModel", "AutoTokenizer", "AutoConfig", "AutoModelForSeq2SeqLM")
    folder.edit_config(auto_map=dict.fromkeys(names, "modeling.Model"), trust_remote_code=True)
    own, class_name = folder.index[folder.component]
    folder.edit_index(**{folder.component: [own, folder.random.choice([class_name, "AutoModel", "AutoTokenizer"])]})


def kernel(folder: Folder) -> None:
    key = folder.random.choice(["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
    folder.edit_config(**{key: "evil/kernel"})


def nested_pipeline(folder: Folder) -> None:
    folder.edit_index(**{folder.component: ["diffusers", "DiffusionPipeline"]})
    (folder.path / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline", "Model"]}))
    folder.write_module(folder.path / "pipeline.py")


def shard(folder: Folder) -> None:
    """The index of the weights names a pickle."""
    name = folder.random.choice(["evil.bin", "../evil.bin", str(folder.folder / "evil.bin")])
    folder.write_pickle(folder.folder / "transformer/evil.bin")
    folder.write_pickle(folder.folder / "evil.bin")
    (folder.folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}, "metadata": {}}))


def adapter(folder: Folder) -> None:
    mapping = {"parent_library": "evil_module", "base_model_class": "Model"}
    content = {"base_model_name_or_path": "/", "peft_type": "LORA", "auto_mapping": mapping}
    (folder.path / "adapter_config.json").write_text(json.dumps(content))
    folder.write_pickle(folder.path / "adapter_model.bin")


WAYS: dict[str, Callable[[Folder], None]] = {
    way.__name__: way
    for way in (pickle_alone, pickle_beside, pickle_as_safetensors, library, module_beside, custom_pipeline)
    + (auto_map, kernel, nested_pipeline, shard, adapter)
}
"""By name."""


def ask_for_code(folder: Path, random_: random.Random, canary: Path, *, way: str | None = None) -> str:
    """Change a checkpoint in one of the `WAYS`; return which, and where."""
    changed = Folder(folder, random_, canary)
    way = way or random_.choice(list(WAYS))
    WAYS[way](changed)
    return f"{way} of {changed.component}"
