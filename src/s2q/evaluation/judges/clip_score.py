"""CLIP scores: similarity of frames to their prompt and to each other, by a CLIP model from a folder.

Two preprocessings, since the figures of papers rest on both. CLIP's own (shorter side resized by a bicubic filter,
centre cropped, normalised) gives `clip_score` (Hessel et al. 2021, without their factor of 2.5). EvalCrafter's scripts
(Liu et al. 2024), whose figures the paper reports, squeeze the frame to a square and give CLIP the raw levels
0..255: its `clipsim` and `clip_temp` are therefore on another scale.

Legend: `F` frames, `H`, `W` height and width in pixels, `S` side of CLIP's input, `E` size of its embeddings.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from s2q.common.errors import InvalidInputError, first_line

CLIP_METRICS = ("clip_score", "clipsim", "clip_temp")
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_FRAMES_AT_ONCE = 16


class ClipJudge:
    """A CLIP model of transformers, from a folder of `CLIPModel.save_pretrained` with the tokenizer's files."""

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPTokenizer

        if not (folder / "config.json").is_file():
            raise InvalidInputError(
                f"{folder}: not a folder with a CLIP model (no config.json); s2q does not download it, pass the path "
                "of openai/clip-vit-base-patch32 or another CLIP model in transformers' format"
            )
        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises whatever its readers raise
            raise InvalidInputError(f"{folder}: cannot be read as a CLIP model: {first_line(error)}") from error
        self._model.eval().to(device)
        self._device = device

    @torch.no_grad()
    def measure(self, prompt: str, frames: torch.Tensor) -> dict[str, float | None]:
        """Return the scores of a video, `[F, H, W, 3]`, uint8; a prompt is cut off at the end of CLIP's context."""
        side = self._model.config.vision_config.image_size
        text = self._text(prompt)
        cosines = self._images(_as_clip_does(frames, side)) @ text
        squeezed = self._images(_as_evalcrafter_does(frames, side))
        pairs = (squeezed[1:] * squeezed[:-1]).sum(dim=1)
        return {
            "clip_score": float(100 * cosines.clamp(min=0).mean()),
            "clipsim": float((squeezed @ text).mean()),
            "clip_temp": float(pairs.mean()) if len(pairs) else None,
        }

    def _text(self, prompt: str) -> torch.Tensor:
        """Embed a prompt: `[E]`, float64, of length 1."""
        tokens: Mapping[str, Any] = self._tokenizer(
            [prompt],
            return_tensors="pt",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
        ).to(self._device)
        pooled = self._model.text_model(**tokens).pooler_output
        return F.normalize(self._model.text_projection(pooled)[0].double().cpu(), dim=0)

    def _images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed frames `[F, 3, S, S]`: `[F, E]`, float64, each of length 1."""
        parts = []
        for part in pixels.split(_FRAMES_AT_ONCE):
            pooled = self._model.vision_model(pixel_values=part.to(self._device)).pooler_output
            parts.append(self._model.visual_projection(pooled).double().cpu())
        return F.normalize(torch.cat(parts), dim=1)


def _as_clip_does(frames: torch.Tensor, side: int) -> torch.Tensor:
    height, width = frames.shape[1:3]
    scale = side / min(height, width)
    size = (max(side, int(width * scale)), max(side, int(height * scale)))
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    box = (left, top, left + side, top + side)
    resized = [Image.fromarray(frame.numpy()).resize(size, Image.Resampling.BICUBIC).crop(box) for frame in frames]
    levels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (levels / 255 - mean) / std


def _as_evalcrafter_does(frames: torch.Tensor, side: int) -> torch.Tensor:
    return F.interpolate(frames.permute(0, 3, 1, 2).float(), size=(side, side), mode="bilinear", align_corners=False)
