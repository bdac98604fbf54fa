"""Load the components of a checkpoint, each model compared with its configuration before its tensors are allocated.

diffusers and transformers only warn of tensors that are missing or left over, and then compute with random ones; and
what fails in a pipeline does not name the component.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2q.checkpoint.config import QuantMethod, S2QConfig
from s2q.checkpoint.quantizer import S2QQuantizer
from s2q.checkpoint.values import check_finite
from s2q.common.errors import InvalidInputError, short_repr
from s2q.common.files import read_json
from s2q.common.foreign_code import component_entries
from s2q.common.headers import TensorInfo, read_headers
from s2q.common.loading_errors import loading_error
from s2q.common.meta import build_model, check_tensors, meta_model
from s2q.common.weight_files import has_variant, names_in, weight_files

if TYPE_CHECKING:
    import torch

REMEDY = "download or quantize the model again"


def load_components(
    folder: Path, index: Mapping[str, Any], *, dtype: torch.dtype, variant: str | None
) -> dict[str, Any]:
    """Load the components of a pipeline folder that are classes of diffusers or transformers, by name.

    Raises:
        InvalidInputError: If one cannot be loaded, or its tensors are not those of its configuration, or not finite.
        ResourceError: If memory or a package is missing.
    """
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    bases = (diffusers.ModelMixin, transformers.PreTrainedModel)
    components = {}
    for name, (library, class_name) in component_entries(index).items():
        component_class = getattr(libraries.get(library), class_name, None)
        if not hasattr(component_class, "from_pretrained"):
            continue  # of a pipeline's own module, or unknown, which diffusers says
        component = folder / name
        if not component.is_dir():  # or the name of a repository, for diffusers
            raise InvalidInputError(f"{component} is missing; {REMEDY}")
        try:
            if issubclass(component_class, bases):
                components[name] = load_model(component, component_class, library, dtype=dtype, variant=variant)
            else:
                components[name] = component_class.from_pretrained(component)
        except Exception as error:
            known = loading_error(component, error, remedy=REMEDY)
            raise (known if str(folder) in str(known) else type(known)(f"{component}: {known}")) from error
    return components


def load_model(component: Path, model_class: Any, library: str, *, dtype: torch.dtype, variant: str | None) -> Any:
    """Load a model from the folder of a component, in a variant where the folder has that.

    Raises:
        InvalidInputError: If its tensors are not those of its configuration, or not finite.
    """
    tensors = read_headers(weight_files(component, library=library, variant=variant))
    is_foreign = not _check_model(component, model_class, library, tensors)
    model, info = model_class.from_pretrained(
        component,
        dtype=dtype,
        variant=variant if has_variant(names_in(component), variant) else None,
        use_safetensors=True,
        output_loading_info=True,
    )
    if is_foreign:
        return model  # type: ignore[no-any-return]
    for problem, keys in info.items():
        if keys:
            first = short_repr(sorted(map(str, keys)))
            raise InvalidInputError(f"{component}: {problem.replace('_', ' ')} {first}; {REMEDY}")
    check_finite(model, remedy=REMEDY)
    return model  # type: ignore[no-any-return]


def _check_model(component: Path, model_class: Any, library: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Compare the tensors in the files of a model with those of its configuration, without allocating them.

    Returns False, without comparing, for a model that is quantized by another tool, which has tensors of its own.
    """
    path = component / "config.json"
    content = read_json(path, remedy=REMEDY)
    quantization = content.pop("quantization_config", None)
    ours = isinstance(quantization, Mapping) and quantization.get("quant_method") == QuantMethod.S2Q.value
    if quantization is not None and not ours:
        return False
    model = meta_model(
        lambda: build_model(model_class, content),
        path=path,
        name=model_class.__name__,
        max_tensors=len(tensors),
        remedy=REMEDY,
    )
    if ours and library == "transformers":
        from s2q.checkpoint.text_encoders import pack_encoder

        pack_encoder(model, S2QConfig.from_dict(dict(quantization)))
    elif ours:
        S2QQuantizer(S2QConfig.from_dict(dict(quantization))).pack(model)
    check_tensors(tensors, model.state_dict(), folder=component, remedy=REMEDY)
    return True
