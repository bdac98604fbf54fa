"""The weight files of a pipeline's component: exactly those that diffusers and transformers load.

Both libraries read only safetensors here (`use_safetensors=True`); a pickle is never read. In the component's folder
they open the first of

    diffusers      STEM.safetensors.index[.VARIANT].json, STEM[.VARIANT].safetensors     STEM = diffusion_pytorch_model
    transformers   STEM[.VARIANT].safetensors, STEM.safetensors.index[.VARIANT].json     STEM = model

and of an index the shards that it names. Other weight files beside them, left by an earlier save or of another variant,
are not read. With a variant, a component that has no file of it is loaded without one.
"""

import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from s2q.common.errors import InvalidInputError
from s2q.common.files import atomic_write_json, is_plain_name, read_json

logger = logging.getLogger(__name__)

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHTS = re.compile(
    rf"(?:diffusion_pytorch_model|pytorch_model|model)(?:{_SHARD})?"
    rf"(?:\.(?P<variant>[^.]+?)(?:{_SHARD})?)?\.(?P<suffix>safetensors|bin)"
)

_INDEX = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)\.(?:safetensors|bin)(?:\.[^.]+)*\.json")


def weight_files(
    folder: Path, *, library: str = "diffusers", variant: str | None = None, names: Collection[str] | None = None
) -> tuple[Path, ...]:
    """Return the files that `from_pretrained` reads the weights of a component from, in order.

    Args:
        library: Library of its class as model_index.json has it: "diffusers", "transformers", or another.
        names: Names of all its files, where not all have been downloaded; None lists the folder.

    Returns:
        The files, which may be missing where all are (a folder of configurations); none without weights.
    """
    present = names_in(folder) if names is None else set(names)
    used = variant if has_variant(present, variant) else None
    entry = _entry(present, library, used)
    if entry is None:
        _refuse_others(folder, present, used)
        return ()
    files = _shards(folder / entry) if entry.endswith(".json") else [entry]
    missing = [name for name in files if name not in present]
    if missing and len(missing) < len(files):
        raise InvalidInputError(
            f"{folder / entry}: names {missing[0]}, which is missing; download or save the model again"
        )
    ignored = sorted(name for name in present.difference(files) if _WEIGHTS.fullmatch(name))
    if ignored:
        logger.debug("%s: %s is loaded; ignored: %s", folder, entry, ", ".join(ignored))
    return tuple(folder / name for name in files)


def copy_component(source: Path, target: Path, *, library: str, variant: str | None) -> None:
    """Copy the folder of a component without hidden files: of its weights those that are loaded, variants unnamed."""
    present = names_in(source)
    weights = {path.name for path in weight_files(source, library=library, variant=variant)}
    entry = _entry(present, library, variant if has_variant(present, variant) else None)

    def left_out(folder: str, names: list[str]) -> list[str]:
        is_top = Path(folder) == source
        return [name for name in names if name.startswith(".") or (is_top and _is_weights(name))]

    shutil.copytree(source, target, copy_function=shutil.copyfile, ignore=left_out)
    for name in weights:
        shutil.copyfile(source / name, target / _without_variant(name))
    if entry is not None and entry not in weights:
        index = read_json(source / entry, remedy="download or save the model again")
        index["weight_map"] = {tensor: _without_variant(name) for tensor, name in index["weight_map"].items()}
        atomic_write_json(target / f"{entry.partition('.')[0]}.safetensors.index.json", index)


def _is_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None or _INDEX.fullmatch(name) is not None


def _without_variant(name: str) -> str:
    match = _WEIGHTS.fullmatch(name)
    if match is None or match["variant"] is None:
        return name
    return name[: match.start("variant") - 1] + name[match.end("variant") :]


def has_variant(names: Collection[str], variant: str | None) -> bool:
    """Return whether diffusers takes a component to have a variant."""
    return variant is not None and any("." in name and name.split(".")[1].startswith(variant) for name in names)


def variants_in(names: Collection[str]) -> list[str]:
    """Return the variants that a component has safetensors weights of."""
    matches = [match for match in map(_WEIGHTS.fullmatch, names) if match and match["suffix"] == "safetensors"]
    return sorted({match["variant"] for match in matches if match["variant"]})


def names_in(folder: Path) -> set[str]:
    """Return the names of what is in a folder; none if it is missing."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _entry(names: Collection[str], library: str, variant: str | None) -> str | None:
    """The name of the file that is opened first: a single file or an index."""
    infix = "" if variant is None else f".{variant}"
    candidates = []
    for loader in (library,) if library in _STEMS else _STEMS:  # a pipeline's own module may use either library
        stem = _STEMS[loader]
        index, single = f"{stem}.safetensors.index{infix}.json", f"{stem}{infix}.safetensors"
        legacy = f"{stem}.safetensors{infix}.index.json"  # diffusers before 0.30
        candidates += [single, index] if loader == "transformers" else [index, legacy, single]
    return next((name for name in candidates if name in names), None)


def _shards(index: Path) -> list[str]:
    remedy = "download or save the model again"
    files = read_json(index, remedy=remedy).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    shards = sorted({name for name in names if isinstance(name, str)})
    if not shards or len(names) != sum(is_plain_name(name) for name in names):
        raise InvalidInputError(f"{index}: expected names of files beside it in weight_map; {remedy}")
    return shards


def _refuse_others(folder: Path, names: Collection[str], variant: str | None) -> None:
    """Refuse a component whose weights are there, but not as asked for."""
    variants = variants_in(names)
    if variant is not None:
        has = f"it has {', '.join(variants)}" if variants else "it has none in safetensors"
        raise InvalidInputError(f"{folder}: no weights of variant {variant!r} in safetensors; {has}")
    if variants:
        choice = " or ".join(f"--variant {name}" for name in variants)
        raise InvalidInputError(
            f"{folder}: has only weights of variant {' and '.join(variants)}; pass {choice} "
            f'(variant="{variants[0]}" in Python)'
        )
    pickles = sorted(name for name in names if (match := _WEIGHTS.fullmatch(name)) and match["suffix"] == "bin")
    if pickles:
        raise InvalidInputError(
            f"{folder}: has only pickled weights ({pickles[0]}), which are not read because a pickle can run code; "
            "load the pipeline with diffusers and save it with save_pretrained(FOLDER, safe_serialization=True)"
        )
