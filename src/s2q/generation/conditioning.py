"""Conditioning of the videos of a pipeline: text alone, or text, an image and other videos; arguments of its call.

A pipeline with an image makes one video a call, from one image, which it resizes itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2q.common.errors import InvalidInputError, ResourceError, counted
from s2q.common.versions import is_installed
from s2q.generation.prompts import ConditioningImage, Prompt, prompt_list
from s2q.generation.videos import still
from s2q.models import family_of
from s2q.models.family import ImageToVideo

if TYPE_CHECKING:
    from s2q.generation.settings import GenerationSettings


def image_to_video(pipe: Any) -> ImageToVideo | None:
    """Return what is known of a pipeline of its family that takes an image; None for any other pipeline."""
    return family_of(pipe.transformer).image_pipeline(_class_names(pipe))


def is_supported(pipe: Any) -> bool:
    """Whether a pipeline makes videos of text, or of text and an image, as its family describes it."""
    return family_of(pipe.transformer).pipeline_class in _class_names(pipe) or image_to_video(pipe) is not None


def check_supported(pipe: Any) -> None:
    """Refuse a pipeline that needs something else, a video or a mask, and one whose call needs a missing package."""
    if not is_supported(pipe):
        family = family_of(pipe.transformer)
        classes = {family.pipeline_class: None}
        if family.image_to_video is not None:
            classes[family.image_to_video.pipeline_class] = None
        raise InvalidInputError(
            f"{type(pipe).__name__}: s2q generates and calibrates with {' or '.join(classes)} only; use a recipe "
            "without calibration and call the loaded pipeline in Python, or load the model in one of these"
        )
    known = image_to_video(pipe)
    missing = [package for package in (known.packages if known else ()) if not is_installed(package)]
    if missing:
        raise ResourceError(
            f"{type(pipe).__name__}: its call needs {' and '.join(missing)}, not installed; pip install "
            f"{' '.join(missing)}"
        )


def check_conditioning(pipe: Any, where: str, prompt: Prompt, *, num_frames: int) -> None:
    """Refuse a prompt without an image or a video that the pipeline needs, and one with some that it does not take."""
    known, name = image_to_video(pipe), type(pipe).__name__
    if known is None:
        for kind in ("image",) if prompt.image is not None else tuple(prompt.videos):
            raise InvalidInputError(f"{where}: {kind}: {name} generates from text alone; remove it")
        return
    needed = ("image", *known.videos)
    given = {**({} if prompt.image is None else {"image": prompt.image}), **prompt.videos}
    for kind in needed:
        if kind not in given:
            keys = ", ".join(f'"{key}": PATH' for key in needed)
            raise InvalidInputError(
                f"{where}: has no {kind}; {name} needs {'an image' if kind == 'image' else 'that'} per prompt: a "
                f'.jsonl file with {{"prompt": ..., {keys}}} a line ({_in_python(needed)} in Python)'
            )
    further = [kind for kind in known.further_videos if kind in given]
    if further and len(further) < len(known.further_videos):
        missing = " and ".join(kind for kind in known.further_videos if kind not in given)
        raise InvalidInputError(f"{where}: {further[0]}: {name} takes it with {missing} only; add that, or remove it")
    for kind, video in prompt.videos.items():
        if kind not in (*known.videos, *known.further_videos):
            raise InvalidInputError(f"{where}: {kind}: {name} does not take it; remove it")
        if video.count is not None and video.count < num_frames:
            raise InvalidInputError(
                f"{where}: {kind}: {video.name} has {counted(video.count, 'frame')}; expected at least the "
                f"{num_frames} of the video: use a longer one, or a smaller num_frames"
            )


def _in_python(needed: Sequence[str]) -> str:
    keys = ", ".join(f'"{key}": ...' for key in needed)
    return f'prompts=[{{"prompt": ..., {keys}}}]'


def check_size(pipe: Any, settings: GenerationSettings) -> None:
    """Refuse fewer frames than a pipeline makes, and a size that it makes of no image if it takes it from that."""
    known = image_to_video(pipe)
    if known is not None and settings.num_frames < known.least_frames:
        raise InvalidInputError(
            f"num_frames: got {settings.num_frames}; {type(pipe).__name__} makes at least {known.least_frames} frames"
        )
    if known is None or known.takes_size:
        return
    size = settings.height, settings.width
    made = pipe.video_processor.calculate_default_height_width(*size, pipe.target_size)
    if tuple(map(int, made)) != size:
        raise InvalidInputError(
            f"height, width: got {size[0]} and {size[1]}; {type(pipe).__name__} makes {made[0]} x {made[1]} of this "
            "aspect ratio; use these"
        )


def takes_batches(pipe: Any) -> bool:
    """Whether a call of a pipeline takes several prompts."""
    return family_of(pipe.transformer).takes_batches and image_to_video(pipe) is None


def draws_noise(pipe: Any) -> bool:
    """Whether a pipeline must draw the initial noise itself."""
    known = image_to_video(pipe)
    return family_of(pipe.transformer).draws_noise or (known is not None and known.draws_noise)


def image_tokens(pipe: Any) -> int:
    """Return how many tokens of an image the blocks see beside those of the text."""
    known = image_to_video(pipe)
    if known is None or getattr(pipe.transformer.config, known.embedded_by, None) is None:
        return 0
    return known.tokens


def any_prompt(pipe: Any) -> Prompt:
    """Return a prompt that a pipeline takes, black images and videos with it where it needs them: to measure times."""
    from PIL import Image

    known, image = image_to_video(pipe), Image.new("RGB", (64, 64))
    given = {} if known is None else {"image": image, **dict.fromkeys(known.videos, still(image))}
    (prompt,) = prompt_list("prompts", [{"prompt": "red", **given}])
    return prompt


def adapt_call(pipe: Any, arguments: dict[str, Any], prompts: Sequence[Prompt], settings: GenerationSettings) -> None:
    """Change the arguments of a call to those of a pipeline that takes one prompt, or an image and videos with it."""
    if not takes_batches(pipe):
        for name in {"prompt", "negative_prompt", "generator"} & arguments.keys():
            (arguments[name],) = arguments[name]
    arguments[family_of(pipe.transformer).frames_argument] = arguments.pop("num_frames")
    known = image_to_video(pipe)
    if known is None:
        return
    (prompt,) = prompts
    assert prompt.image is not None, "check_prompts refuses a prompt without an image"
    arguments["image"] = prompt.image.pixels
    arguments |= {name: video.frames(settings.num_frames) for name, video in prompt.videos.items()}
    if known.further_call and prompt.videos.keys() & set(known.further_videos):
        arguments |= known.further_call
    if not known.takes_size:
        del arguments["height"], arguments["width"]
        arguments["image"] = _resized(pipe, known, prompt.image, height=settings.height, width=settings.width)


def starting_image(pipe: Any, prompt: str, *, height: int, width: int) -> torch.Tensor | None:
    """Return the image of a prompt as a pipeline resizes it, uint8 `[H, W, 3]`; None where no video starts from it."""
    image, known = Prompt.of(prompt).image, image_to_video(pipe)
    if image is None or known is None or not known.starts_video:
        return None
    return torch.from_numpy(np.array(_resized(pipe, known, image, height=height, width=width)))


def _resized(pipe: Any, known: ImageToVideo, image: ConditioningImage, *, height: int, width: int) -> Any:
    """Resize an image as a pipeline does that takes a size, or crop it to the size that one makes of it."""
    mode = "default" if known.takes_size else "crop"
    return pipe.video_processor.resize(image.pixels, height=height, width=width, resize_mode=mode)


def _class_names(pipe: Any) -> set[str]:
    return {base.__name__ for base in type(pipe).__mro__}
