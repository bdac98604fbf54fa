"""Entries of a comparison: built-in recipes, recipe files, checkpoints and peers, checked before any compute."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from s2q.checkpoint import inspect_checkpoint
from s2q.checkpoint.manifest import MANIFEST
from s2q.common.errors import InvalidInputError
from s2q.common.files import sha256_file
from s2q.common.headers import tensors_digest
from s2q.comparison.peers import Peer, find_peers
from s2q.comparison.widths import foreign_width, recipe_width
from s2q.generation.defaults import calibrated_generation
from s2q.generation.load import check_model, is_checkpoint
from s2q.models import ModelSource, resolve_model
from s2q.models.hub import parse_hub_id
from s2q.models.lora import effect_of
from s2q.recipes.load import FILE_SUFFIXES, load_recipe
from s2q.recipes.methods import matching_recipes, recipe_names, unknown_recipe
from s2q.recipes.schema import Recipe
from s2q.recipes.variants import SEPARATOR
from s2q.shapes.embedded import EMBEDDED_NAMES

FULL_PRECISION = "full-precision"
"""Label of the reference; no entry may have it."""

_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth")
_OPTIONAL_GROUPS = ("activations", "distillation", "refinement")
"""Groups of a recipe whose changes are meant for the recipes that have them: another would become another method."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recipe with its changes, a checkpoint, or another tool, to compare with full precision.

    Attributes:
        label: Its unique name, also in file names.
        width: Bits of weights and activations, "w4a6": entries of one width are ranked together.
    """

    label: str
    given: str
    recipe: Recipe | None
    overrides: tuple[str, ...]
    source: ModelSource | None
    width: str
    peer: Peer | None = None

    @property
    def description(self) -> str:
        """One sentence for people."""
        if self.peer is not None:
            return f"{self.peer.package} {self.peer.version}: {self.peer.does}"
        return self.recipe.description if self.recipe is not None else f"checkpoint {self.given}"

    @property
    def path(self) -> str | None:
        """Absolute path or Hub id of the checkpoint; None for a recipe or a peer."""
        return None if self.source is None else self.source.pinned

    @property
    def calibrates(self) -> bool:
        """Whether making it needs calibration prompts."""
        return self.peer.calibrates if self.peer is not None else self.recipe is not None and self.recipe.calibrates

    @property
    def generation(self) -> dict[str, Any] | None:
        """The generation settings besides sizes that it calibrates with; None if it does not calibrate."""
        if self.source is not None:
            return calibrated_generation(self.source)
        return self.recipe.calibration.generation if self.recipe is not None and self.recipe.calibrates else None

    def identity(self) -> dict[str, Any]:
        """Return what its results depend on, as plain data: the recipe, or what the checkpoint holds."""
        if self.recipe is not None:
            return {"recipe": {key: value for key, value in self.recipe.resolved().items() if key != "description"}}
        if self.peer is not None:
            return {"peer": {"name": self.peer.name, "version": self.peer.version, "does": self.peer.does}}
        assert self.source is not None
        return {"checkpoint": content_of(self.source)}


def find_entries(
    given: Sequence[str],
    *,
    peers: Sequence[str] = (),
    overrides: Sequence[str] = (),
    variant: str | None = None,
    verify: bool | None = None,
) -> list[Entry]:
    """Find everything that is to be compared, in the order in which it was given.

    Args:
        given: Names and shell-style patterns of recipes of the package, `all`, recipe files, checkpoint folders, Hub
            ids of checkpoints, or embedded models.
        peers: Names of peers, or `all` for the installed ones; they come last.
        overrides: Changes to the recipes; those to a group that a recipe does without (`activations`, `calibration`,
            `distillation`, `refinement`) are not made to it.
    """
    entries: list[Entry] = []
    for text, from_pattern in _expanded(given):
        if any(entry.given == text for entry in entries):
            if from_pattern:
                continue
            raise InvalidInputError(f"{text} appears twice; pass it once")
        entries.append(_entry(text, overrides, variant=variant, verify=verify))
    used = {override for entry in entries for override in entry.overrides}
    for override in overrides:
        if override not in used:
            raise InvalidInputError(f"override {override!r} changes none of the recipes; remove it")
    return _with_distinct_labels([*entries, *map(_peer_entry, find_peers(peers))])


def content_of(source: ModelSource) -> Any:
    """Return what tells a model apart from others: the hash of its manifest, its commit on the Hub, or its files.

    Of files, configurations are hashed, and of the weights that are loaded the start of every tensor: what trained a
    model further has changed it, and reading all of it would take minutes.
    """
    if source.loras:
        return {
            "model": content_of(replace(source, loras=())),
            "loras": effect_of(lora.to_dict() for lora in source.loras),
        }
    if source.originals:
        files = {component: tensors_digest(path) for component, path in source.originals.items()}
        return {"base": content_of(replace(source, originals={})), "files": files}
    if source.hub is not None:
        return source.folder.name if source.variant is None else f"{source.folder.name} {source.variant}"
    manifest = source.folder / MANIFEST
    if manifest.is_file():
        return sha256_file(manifest)
    weights = (path for component in source.component_classes for path in source.weight_files(component))
    return content_of_files(source.folder, {*source.folder.glob("*.json"), *source.folder.glob("*/*.json"), *weights})


def content_of_files(folder: Path, files: Iterable[Path]) -> dict[str, Any]:
    """Return what tells the configurations and weights of a folder apart from others of their names."""
    contents: dict[str, Any] = {}
    for path in sorted(files):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json":
            contents[name] = sha256_file(path)
        elif path.suffix == ".safetensors":
            contents[name] = tensors_digest(path)
        elif path.suffix in _OTHER_WEIGHTS:
            contents[name] = path.stat().st_size
    return contents


def _expanded(given: Sequence[str]) -> list[tuple[str, bool]]:
    """Every name, and whether it matched a pattern."""
    expanded: list[tuple[str, bool]] = []
    for text in given:
        names = matching_recipes(text)
        expanded += [(text, False)] if names is None else [(name, True) for name in names]
    explicit = {text for text, from_pattern in expanded if not from_pattern}
    return [(text, from_pattern) for text, from_pattern in expanded if not (from_pattern and text in explicit)]


def _entry(text: str, overrides: Sequence[str], *, variant: str | None, verify: bool | None) -> Entry:
    path, names = Path(text).expanduser(), recipe_names()
    is_file = text.endswith(FILE_SUFFIXES) and not path.is_dir()
    if is_file or text.partition(SEPARATOR)[0] in names:
        plain = load_recipe(text)
        changes = tuple(override for override in overrides if _is_for(plain, override))
        recipe = load_recipe(text, overrides=changes)
        width = recipe_width(recipe.resolved())
        label = _as_file_name(recipe.name)
        return Entry(label=label, given=text, recipe=recipe, overrides=changes, source=None, width=width)
    if not (path.exists() or text in EMBEDDED_NAMES or parse_hub_id(text)):
        if "/" in text:
            raise InvalidInputError(f"{text}: no such checkpoint folder; built-in recipes: {', '.join(names)}")
        raise unknown_recipe(text)
    source = resolve_model(text, variant=variant, needs_variant=False)
    check_model(source, verify=verify)
    label = _as_file_name(path.resolve().name if source.kind == "folder" else text)
    return Entry(label=label, given=text, recipe=None, overrides=(), source=source, width=_stored_width(source))


def _peer_entry(peer: Peer) -> Entry:
    given = peer.name
    return Entry(label=peer.label, given=given, recipe=None, overrides=(), source=None, width=peer.width, peer=peer)


def _is_for(recipe: Recipe, override: str) -> bool:
    group = override.partition("=")[0].strip().split(".")[0]
    if group == "calibration":
        return recipe.calibrates
    return group not in _OPTIONAL_GROUPS or getattr(recipe, group) is not None


def _with_distinct_labels(entries: Sequence[Entry]) -> list[Entry]:
    """Label checkpoints of one name by their parent folders."""
    counts = Counter([FULL_PRECISION, *(entry.label for entry in entries)])
    labelled: dict[str, Entry] = {}
    for entry in entries:
        label = entry.label
        if counts[label] > 1 and entry.source is not None and entry.source.kind == "folder":
            label = _as_file_name(f"{Path(entry.given).expanduser().resolve().parent.name}-{label}")
        if label in labelled or label == FULL_PRECISION:
            other = labelled[label].given if label in labelled else "the reference"
            raise InvalidInputError(f"{entry.given} and {other} would both be labelled {label}; rename one of them")
        labelled[label] = replace(entry, label=label)
    return list(labelled.values())


def _as_file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.") or "entry"


def _stored_width(source: ModelSource) -> str:
    """The width of a checkpoint: what its recipe says, else what most of its quantized weights have."""
    if not is_checkpoint(source):
        return foreign_width(source.quantization)
    recipe = source.complete_folder() / "s2q" / "recipe.json"
    if recipe.is_file():
        return recipe_width(json.loads(recipe.read_text(encoding="utf-8")))
    sizes: Counter[str] = Counter()
    for layer in inspect_checkpoint(source.complete_folder(), variant=source.variant).layers:
        sizes[re.sub(r"g\d+", "", layer.scheme)] += layer.shape[0] * layer.shape[1]
    return sizes.most_common(1)[0][0]
