"""Load a checkpoint after checking it against its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s2q import pipelines
from s2q.checkpoint.config import QuantMethod, S2QConfig
from s2q.checkpoint.load_components import REMEDY, load_components
from s2q.checkpoint.manifest import check_intact, intact
from s2q.checkpoint.quantizer import register
from s2q.common.components import TRANSFORMERS
from s2q.common.errors import InvalidInputError, short_repr
from s2q.common.files import read_json
from s2q.common.foreign_code import check_folder
from s2q.common.loading_errors import loading_error
from s2q.common.torch_state import in_fresh_torch_state

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@in_fresh_torch_state
def load_pipeline(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    device: str = "cpu",
    verify: bool | None = None,
) -> DiffusionPipeline:
    """Load a checkpoint as a pipeline, its progress bar off.

    Args:
        dtype: Compute dtype; None takes the one that the model had when it was quantized.
        variant: Variant of the weights, for a checkpoint that diffusers has saved again with one.

    Raises:
        InvalidInputError: If the folder is no s2q checkpoint, or a file is missing, damaged or altered (names it).
        ResourceError: If memory or a package that a component needs is missing.
    """
    register()
    folder = Path(path)
    config, *_ = read_configs(folder).values()
    check_intact(folder, verify=verify)
    index = pipelines.read_index(folder, remedy=REMEDY)
    check_folder(folder, index)
    compute_dtype = dtype or getattr(torch, config.compute_dtype)
    with intact():
        components = load_components(folder, index, dtype=compute_dtype, variant=variant)
        try:
            pipe = pipelines.load_pipeline(folder, index, dtype=compute_dtype, variant=variant, components=components)
        except Exception as error:
            raise loading_error(folder, error, remedy=REMEDY) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def read_config(folder: Path, component: str = TRANSFORMERS[0]) -> S2QConfig:
    """Read the quantization configuration of a transformer of a checkpoint."""
    config = read_transformer_config(folder, component).get("quantization_config")
    if _method(config) != QuantMethod.S2Q.value:
        raise _not_ours(folder, config)
    path = folder / component / "config.json"
    try:
        return S2QConfig.from_dict(dict(config))
    except (TypeError, AttributeError) as error:
        raise InvalidInputError(f"{path}: damaged quantization_config ({error}); {REMEDY}") from error
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: {error}") from error


def read_configs(folder: Path) -> dict[str, S2QConfig]:
    """Read the configurations of the transformers that s2q has quantized, by component; at least one."""
    stored = {
        component: read_transformer_config(folder, component).get("quantization_config")
        for component in stored_transformers(folder)
    }
    ours = [component for component, config in stored.items() if _method(config) == QuantMethod.S2Q.value]
    if not ours:
        raise _not_ours(folder, stored[TRANSFORMERS[0]])
    return {component: read_config(folder, component) for component in ours}


def stored_transformers(folder: Path) -> list[str]:
    """Return the components of a pipeline folder that are transformers."""
    first, *others = TRANSFORMERS
    return [first, *(component for component in others if (folder / component).is_dir())]


def read_transformer_config(folder: Path, component: str = TRANSFORMERS[0]) -> dict[str, Any]:
    """Read config.json of a transformer of a pipeline folder."""
    path = folder / component / "config.json"
    if not path.is_file():
        raise InvalidInputError(
            f"{folder} is not an s2q checkpoint: it has no {component}/config.json; pass its folder"
        )
    return read_json(path, remedy=REMEDY)


def _method(config: Any) -> Any:
    return config.get("quant_method") if isinstance(config, Mapping) else None


def _not_ours(folder: Path, config: Any) -> InvalidInputError:
    return InvalidInputError(
        f"{folder} is not an s2q checkpoint: quant_method is {short_repr(_method(config))}, expected 's2q'"
    )
