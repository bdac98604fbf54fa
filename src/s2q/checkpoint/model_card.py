"""The model card (README.md) of a checkpoint: YAML front matter for the Hub, how to load it, what was measured."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from s2q.checkpoint.config import S2QConfig
from s2q.common.cards import files_and_base, front_matter, read_card, split_card

HOMEPAGE = "https://arxiv.org/abs/2508.04016"
_FOLDER = "path/to/this/folder"
_LICENCE_KEYS = ("license", "license_name", "license_link")


def render_model_card(
    *configs: S2QConfig,
    pipeline_class: str,
    source: str,
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    revision: str | None = None,
    base_folder: Path | None = None,
) -> str:
    """Write the text of a model card, Markdown with YAML front matter.

    Args:
        *configs: The quantization configurations of the checkpoint's transformers.
        source: Hub id, embedded name or folder for `base_model`; the pipeline class (from memory) stays out of it.
        report: The run's report; needs `storage`, and may have `loras`, `text_encoders`, `generation`, and `metrics` as
            in eval.json.
        revision: Commit of the original on the Hub, which the text links to; None if it is not there.
        base_folder: Folder of the original, whose card gives the licence; None if there is none.
    """
    schemes = Counter(scheme for config in configs for scheme in config.layers.values())
    task = task_of(pipeline_class)
    files, base = files_and_base(source)
    is_hub_id = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    at = "" if revision is None else f"/tree/{revision}"
    text = _rendered(
        "model_card.md.j2",
        base_model=None if source == pipeline_class else base,
        licence=_licence(base_folder),
        recipe=recipe,
        title=f"{files or base.rpartition('/')[2]}, quantized with {recipe['name']}",
        origin=("" if files is None else f"`{files}` in ")
        + (f"[{base}](https://huggingface.co/{base}{at})" if is_hub_id else f"`{base}`"),
        homepage=HOMEPAGE,
        layers=schemes.total(),
        schemes=dict(schemes),
        attention=sum(len(config.attention_modules()) for config in configs),
        storage=report["storage"],
        pipeline_class=pipeline_class,
        task=task,
        prompts="--prompts FILE.jsonl" if task == "image-to-video" else '--prompt "…"',
        compute_dtype=configs[0].compute_dtype,
        loras=report.get("loras", ()),
        text_encoders=report.get("text_encoders", ()),
        metrics=report.get("metrics"),
        generation=_settings(report.get("generation", {})),
    )
    return text.rstrip("\n") + "\n"


def published_card(
    text: str, *, repo: str, bases: Sequence[str], metrics: Mapping[str, Any] | None, videos: Mapping[str, str]
) -> str:
    """Return the card of a checkpoint as it is shown on the Hub.

    Args:
        text: The card of its folder, maybe edited.
        repo: Its id, which replaces the folder in commands.
        bases: The `base_model` of the front matter that are ids of the Hub; others are dropped.
        metrics: Of eval.json; they replace those of the card. None keeps them.
        videos: Captions by path in the repository, for the gallery of the page; they replace those of the card. None
            are kept.
    """
    fields, (_, body) = front_matter(text), split_card(text)
    body = body.replace(_FOLDER, repo).rstrip("\n") + "\n"
    if not bases:
        fields = {name: value for name, value in fields.items() if name not in ("base_model", "base_model_relation")}
    elif isinstance(fields["base_model"], list):
        fields["base_model"] = list(bases)
    if metrics is not None:
        body = _with_section(body, "Measured", _rendered("measured.md.j2", metrics=metrics))
    if videos:
        fields["widget"] = [{"text": caption, "output": {"url": path}} for path, caption in videos.items()]
        body = _with_section(body, "Videos", "## Videos\n\n<Gallery />\n")
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True) if fields else ""
    return f"---\n{front}---\n{body}"


def _with_section(body: str, title: str, section: str) -> str:
    """Return the text of a card with a section at its end, in place of one of the same title."""
    rest = re.sub(rf"^## {title}\n.*?(?=^## |\Z)", "", body, flags=re.MULTILINE | re.DOTALL)
    return rest.rstrip("\n") + "\n\n" + section.rstrip("\n") + "\n"


def _rendered(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("s2q.checkpoint", ""),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def task_of(pipeline_class: str) -> str:
    """Return the Hub's name of what a pipeline does, `pipeline_tag` of a model card."""
    of_images = any(word in pipeline_class for word in ("Animate", "I2V", "ImageToVideo"))
    return "image-to-video" if of_images else "text-to-video"


def _settings(generation: Mapping[str, Any]) -> str:
    """Generation settings as code in Markdown, between more backticks than their texts have in a row; "" for none."""
    text = ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in generation.items())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if text else ""


def _licence(base_folder: Path | None) -> dict[str, Any]:
    fields = {} if base_folder is None else read_card(base_folder)
    return {key: fields[key] for key in _LICENCE_KEYS if fields.get(key)}
