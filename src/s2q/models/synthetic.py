"""The dimensions of published transformers, from `synthetic.yaml`: what is needed to time them without their weights.

Legend: `B` samples in a call, `N` video tokens, `T` text tokens, `D` head dim, `I/O` in/out features.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import torch
import yaml
from torch import nn

from s2q.common.errors import unknown_name
from s2q.models import family_of
from s2q.models.family import Family

SYNTHETIC_PREFIX = "synthetic:"
"""Prefix of synthetic models on the command line."""


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """One of a transformer's lists of blocks: its attribute, the class's argument for `count`, and what blocks take.

    `inputs` is a key of `synthetic_blocks.BLOCK_INPUTS`; `sees` does not apply to the family's text linears.
    """

    name: str
    count: int
    argument: str
    inputs: str
    sees: Literal["joint", "video"]


@dataclass(frozen=True, kw_only=True)
class SyntheticModel:
    """A published transformer by its dimensions.

    Attributes:
        config: Arguments of the diffusers class.
        block_lists: Its lists of blocks, in the order in which they run.
        tokens: N of a video of the recommended size.
        frames: Tokens of it along time.
        batch: B of a call of the transformer.
        calls: Calls of the transformer in one denoising step.
        components: Parameters of the pipeline's other components; those of text encoders with what is outside of their
            layers and two of these.
        image_tokens: Tokens of an image beside those of the text; 0 without.
        audio_tokens: Tokens of its sound; 0 without.
        transformers: How many the pipeline has.
    """

    name: str
    transformer_class: str
    config: Mapping[str, Any] = field(repr=False)
    block_lists: tuple[BlockList, ...]
    tokens: int
    frames: int
    text_tokens: int
    batch: int
    calls: int
    components: Mapping[str, tuple[int, ...]] = field(repr=False)
    image_tokens: int = 0
    audio_tokens: int = 0
    transformers: int = 1

    @property
    def label(self) -> str:
        """Its name on the command line, "synthetic:cogvideox-5b"."""
        return SYNTHETIC_PREFIX + self.name

    @property
    def family(self) -> Family:
        """Its family."""
        return family_of(self.transformer_class)

    @property
    def heads(self) -> int:
        """Heads of an attention."""
        return attention_heads(self.config)[0]

    @property
    def head_dim(self) -> int:
        """D."""
        return attention_heads(self.config)[1]

    @property
    def width(self) -> int:
        """d; that of the heads together, if the configuration has no other."""
        return int(self.config.get("hidden_size", self.heads * self.head_dim))

    @property
    def beside_video(self) -> int:
        """Tokens of text and sound that are in one stream with those of the video."""
        return self.text_tokens + self.audio_tokens if self.family.is_packed else 0

    def meta_transformer(self, *, blocks: int | None = None) -> nn.Module:
        """Build the transformer on the meta device, with `blocks` blocks in each list (None: as the model has)."""
        import diffusers

        config = dict(self.config)
        if blocks is not None:
            for argument in (block_list.argument for block_list in self.block_lists):
                config[argument] = list(range(blocks)) if isinstance(config[argument], list) else blocks
        with torch.device("meta"):
            return getattr(diffusers, self.transformer_class)(**config)

    def rows(self, block_list: BlockList, linear: str, *, tokens: int) -> int:
        """Return how many rows a linear, named inside its block, sees of one sample."""
        if linear in self.family.modulation:
            return 2 if self.family.is_packed else 1  # the timesteps of video and sound
        if linear in self.family.image_linears:
            return self.image_tokens
        if linear in self.family.text_linears:
            return self.text_tokens
        if linear in self.family.audio_linears:
            return self.audio_tokens
        return tokens + (self.beside_video or self.text_tokens) if block_list.sees == "joint" else tokens


def attention_heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the heads of an attention and D by the configuration of a transformer."""
    if "axes_dims" in config:  # of the positions along time, height and width
        return int(config["model_dim"]) // sum(config["axes_dims"]), sum(config["axes_dims"])
    return int(config["num_attention_heads"]), int(config["attention_head_dim"])


def synthetic_names() -> tuple[str, ...]:
    """Return the names of the models, sorted, without `synthetic:`."""
    return tuple(sorted(_contents()))


def synthetic_model(name: str) -> SyntheticModel:
    """Return a model by its name, "synthetic:cogvideox-5b" or "cogvideox-5b"."""
    contents, key = _contents(), name.removeprefix(SYNTHETIC_PREFIX)
    if key not in contents:
        raise unknown_name("synthetic model", key, contents)
    entry = dict(contents[key])
    latent, patch, config = entry.pop("latent"), entry.pop("patch"), entry["config"]
    lists = tuple(
        BlockList(**blocks | {"count": _count(config[blocks["count"]]), "argument": blocks["count"]})
        for blocks in entry.pop("blocks")
    )
    sizes = [size // step for size, step in zip(latent, patch, strict=True)]
    return SyntheticModel(name=key, block_lists=lists, tokens=math.prod(sizes), frames=sizes[0], **entry)


def _count(value: int | list[int]) -> int:
    """Number of blocks by the argument of a class: a number, or the places of a list's blocks beside another list."""
    return len(value) if isinstance(value, list) else value


@functools.cache
def _contents() -> dict[str, Any]:
    text = resources.files("s2q.models").joinpath("synthetic.yaml").read_text(encoding="utf-8")
    contents: dict[str, Any] = yaml.safe_load(text)
    return contents
