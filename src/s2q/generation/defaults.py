"""Names of models in reports, their embedded source, their recommended generation settings and images."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from s2q.common.errors import InvalidInputError, short_repr
from s2q.common.files import read_json
from s2q.common.records import CONVERSION_RECORD, REPORT
from s2q.generation.prompts import Prompt, prompt_list
from s2q.generation.settings import SETTINGS
from s2q.models import ModelSource, family_of, resolve_model
from s2q.shapes import embedded


def model_label(model: Any) -> str:
    """Return a short name for a model in reports: what the user wrote, or where a pipeline object came from."""
    if isinstance(model, (str, Path)):
        return str(model)
    if isinstance(model, ModelSource):
        return model.given
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def generation_defaults(model: Any) -> dict[str, Any]:
    """Return the fields of `GenerationSettings` recommended for a model.

    They are those of the embedded model that it is or was made from, then those that it was calibrated with.
    """
    source = embedded_source(model)
    published = {} if source is None else dict(embedded.generation_defaults(source))
    return published | (calibrated_generation(model) or {})


def calibrated_generation(model: Any) -> dict[str, Any] | None:
    """Return the fields of `GenerationSettings`, besides sizes, that the recipe of a checkpoint calibrated with.

    None for a model that is not a calibrated checkpoint.
    """
    folder = _folder_of(model)
    report = quantization_report(folder)
    if report.get("selection") is None:
        return None
    settings = report.get("generation", {})
    unknown = settings.keys() - SETTINGS if isinstance(settings, dict) else [settings]
    if unknown:
        raise InvalidInputError(
            f"{folder / REPORT}: generation has {short_repr(next(iter(unknown)))}; expected generation settings by "
            "name, quantize the model again"
        )
    return dict(settings)


def frame_rate_of(model: Any) -> int:
    """Return the frames per second at which a model's videos move as they should."""
    if embedded_source(model) is not None:
        return embedded.FRAME_RATE
    named = isinstance(model, (str, Path, ModelSource))
    return family_of(resolve_model(model).transformer_class if named else model.transformer).frame_rate


def embedded_source(model: Any) -> str | None:
    """Return the embedded model that a model is or was made from, by name, folder or report; None if there is none."""
    folder = _folder_of(model)
    for candidate in (model_label(model), checkpoint_record(folder).get("source")):
        if candidate in embedded.EMBEDDED_NAMES:
            return str(candidate)
    for candidate in embedded.EMBEDDED_NAMES if folder.is_dir() else ():
        if folder.resolve() == Path(embedded.embedded_folder(candidate)).resolve():
            return candidate
    return None


def with_first_frames(model: Any, prompts: Iterable[str]) -> list[Prompt]:
    """Give captions without an image the first frame of the scene that they describe.

    Only for models that are or were made from an embedded one whose videos start from an image; other prompts are
    returned unchanged.
    """
    source = embedded_source(model)
    return [_with_first_frame(source, Prompt.of(text)) for text in prompts]


def _with_first_frame(source: str | None, prompt: Prompt) -> Prompt:
    from PIL import Image

    frame = None if source is None or prompt.image is not None else embedded.first_frame(source, prompt)
    if frame is None:
        return prompt
    given = {"prompt": str(prompt), "negative_prompt": prompt.negative_prompt, "seed": prompt.seed}
    return prompt_list("prompts", [given | {"image": Image.fromarray(frame.numpy())}])[0]


def quantization_scheme(model: Any) -> str | None:
    """Return what most linears of a checkpoint are quantized to, "w4a6"; None for a model that is not a checkpoint."""
    layers = checkpoint_record(_folder_of(model)).get("layers", [])
    counts = Counter(layer["scheme"] for layer in layers)
    return counts.most_common(1)[0][0] if counts else None


def _folder_of(model: Any) -> Path:
    return model.folder if isinstance(model, ModelSource) else Path(model_label(model))


def quantization_report(folder: Path) -> dict[str, Any]:
    """Return the report of the run that made a checkpoint; empty if there is none."""
    path = folder / REPORT
    return read_json(path, remedy="quantize the model again") if path.is_file() else {}


def checkpoint_record(folder: Path) -> dict[str, Any]:
    """Return the report of the run or the record of the conversion that made a checkpoint; empty if there is none.

    Both have source, storage, layers and `simulated`.
    """
    path = folder / CONVERSION_RECORD
    return read_json(path, remedy="convert the model again") if path.is_file() else quantization_report(folder)
