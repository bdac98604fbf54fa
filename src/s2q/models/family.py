"""Description of a model family, and the list of a transformer's block linears.

Linears are found by the prefix of a block list and never by name alone: other parts of a transformer have linears with
the same names.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from s2q.common.errors import InvalidInputError
from s2q.common.fp32_modules import is_within, kept_in_fp32
from s2q.core.tokens import TokenLayout

Role = Literal["linear", "modulation", "outer"]

OUTSIDE = -1
"""The block index of linears that lie outside the blocks."""


@dataclass(frozen=True, kw_only=True)
class ImageToVideo:
    """The pipeline of a family that makes a video of an image: its argument `image` is one image, its prompt one text.

    Attributes:
        draws_noise: Whether it must draw the initial noise itself, because it adds the image only to its own.
        takes_size: Whether its call takes height and width; else the size of a video follows from the image's.
        tokens: Tokens of the image that blocks see beside those of the text, in the published models.
        embedded_by: Field of a transformer's configuration without which it sees none.
        packages: Optional dependencies of diffusers that its call imports, by their names on PyPI.
        starts_video: Whether the image is the first frame of the video; else it shows who or what is in it.
        videos: Videos that it needs beside the image, by argument, of at least as many frames as it makes.
        further_videos: Videos that it takes all of or none.
        further_call: Arguments of its call with those.
        least_frames: Fewest frames that it makes.
    """

    pipeline_class: str
    draws_noise: bool = False
    takes_size: bool = True
    tokens: int = 0
    embedded_by: str = ""
    packages: tuple[str, ...] = ()
    starts_video: bool = True
    videos: tuple[str, ...] = ()
    further_videos: tuple[str, ...] = ()
    further_call: Mapping[str, Any] = field(default_factory=dict)
    least_frames: int = 1


@dataclass(frozen=True, kw_only=True)
class FrameGroups:
    """Numbers of frames that a VAE decodes, where they are not k n + 1: `frames` n + `first_frames`, within limits.

    Attributes:
        frames: Frames of a group.
        latents: Latent frames of a group.
        first_frames: Frames beside the groups.
        first_latents: Their latent frames.
        least: Fewest frames that the pipeline makes.
        most: Most frames.
    """

    frames: int
    latents: int
    first_frames: int
    first_latents: int
    least: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of transformers that share their structure; one file a family.

    Attributes:
        pipeline_class: Name of the text-to-video pipeline that calibration runs.
        block_lists: Attributes of the transformer that hold its blocks, in the order in which they run.
        modulation: Linears of a block, relative to it, that see one row a sample (adaLN): weight-only.
        shared_inputs: Groups of linears of a block that read the same tensor, hence share a transform; the others read
            one of their own.
        text_linears: Linears of a block that see text tokens alone.
        image_linears: Those of them that see tokens of an image.
        audio_linears: Linears of a block that see audio tokens alone.
        attention: The module of a block whose attention says which tokens matter.
        linear_attention: Whether that is linear attention, without a softmax map.
        streams: Keyword arguments of a block that it returns anew, in the order in which it returns them: the video is
            "hidden_states", the text "encoder_hidden_states", the audio "audio_hidden_states".
        list_streams: The same of a block list whose blocks return others, by its attribute.
        block_arguments: The names of blocks for "hidden_states" and "encoder_hidden_states", if others.
        chained: Whether each block is called with what the one before returned. Otherwise something is added between
            them, and calibration finds a block's inputs by running the transformer up to it.
        joint_order: The streams in the order in which the attention joins their tokens; one stream if it sees only one.
        latents: Layout of one video's latents: "frames first" [f, C, h, w], "channels first" [C, f, h, w], "channels
            last" [f, h, w, C], or "tokens" [f · h · w, C]. "packed" is a sequence of text, sound and video as one
            stream, by the indices of each (`s2q.core.tokens`); the latents [f · h · w, C] are those of its tokens.
        frame_groups: Numbers of frames that the VAE decodes; None for those of its factor, k n + 1.
        reference_frames: Latent frames in front of those of the video, which the pipeline does not decode.
        size_multiple: What the pipeline itself asks of height and width, in pixels.
        guidance: The two branches of classifier-free guidance: "batched" in one call, unconditional rows first; in "two
            calls", the conditional one first; or in two such calls by a component "guider", which has the guidance
            weight: the pipeline then takes neither that weight nor a prompt length nor a callback. "apart" is in two
            calls with texts of different lengths: the conditional one alone is recorded. "embedded" is
            guidance that was distilled into the transformer: one branch, with the weight as an input.
        text_tokens: Longest prompt in tokens, end token included, where a transformer's configuration does not say.
        call: Arguments of the pipeline's call beside the settings; those that switch off further passes of guidance.
        frames_argument: The argument of its call for the number of frames.
        unbatched: Tensors among the arguments of a transformer that do not have a row for each sample.
        takes_batches: Whether the pipeline takes several prompts; one that does not is called with a prompt alone.
        draws_noise: Whether the pipeline must draw the initial noise itself, because it takes no noise unchanged; it
            does so in fp32, from the generators.
        defaults: `GenerationSettings` of the published models; sizes in a transformer's configuration come first.
        frame_rate: Frames per second of the videos on the models' pages (docs/real-models.md); a variant may differ.
        kept_linears: Linears of a block with so few rows that they are never quantized.
        latent_linears: Linears outside the blocks that read or return latents: small, and never quantized.
        timestep_embeddings: What the modulation linears read, if that depends on timesteps alone: SiLU of the sum of
            these embeddings, each the names of a projection and of the module that reads it, and the constant that is
            embedded, or None for the timestep. A transformer may lack some.
        image_to_video: Its image-to-video pipeline, if calibration and evaluation run it.
        original_names: Names in the original layout that the converter of diffusers 0.42 does not know: patterns with
            their replacements.
        decodes_batches: Whether the VAE can decode several videos at once; one that cannot is given them one by one.
        timestep_arguments: What the pipeline passes to the scheduler's `set_timesteps` besides the number of steps.
    """

    name: str
    transformer_class: str
    pipeline_class: str
    block_lists: tuple[str, ...]
    modulation: tuple[str, ...]
    shared_inputs: tuple[tuple[str, ...], ...]
    text_linears: tuple[str, ...]
    attention: str
    streams: tuple[str, ...]
    joint_order: tuple[str, ...]
    latents: Literal["frames first", "channels first", "channels last", "tokens", "packed"]
    size_multiple: int
    guidance: Literal["batched", "two calls", "guider", "apart", "embedded"]
    text_tokens: int
    defaults: Mapping[str, int | float]
    frame_rate: int
    image_linears: tuple[str, ...] = ()
    audio_linears: tuple[str, ...] = ()
    linear_attention: bool = False
    frame_groups: FrameGroups | None = None
    reference_frames: int = 0
    call: Mapping[str, Any] = field(default_factory=dict)
    frames_argument: str = "num_frames"
    block_arguments: Mapping[str, str] = field(default_factory=dict)
    list_streams: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    chained: bool = True
    unbatched: tuple[str, ...] = ()
    takes_batches: bool = True
    draws_noise: bool = False
    image_to_video: ImageToVideo | None = None
    original_names: tuple[tuple[str, str], ...] = ()
    decodes_batches: bool = True
    kept_linears: tuple[str, ...] = ()
    timestep_arguments: tuple[str, ...] = ()
    latent_linears: tuple[str, ...] = ("patch_embed.proj", "proj_in", "proj_out")
    timestep_embeddings: tuple[tuple[str, str, float | None], ...] = ()

    def image_pipeline(self, classes: Collection[str]) -> ImageToVideo | None:
        """Return what is known of the pipeline that takes an image, if its class is among some names."""
        known = self.image_to_video
        return known if known is not None and known.pipeline_class in classes else None

    def streams_of(self, block_name: str) -> tuple[str, ...]:
        """Return the streams of a block by its full name in the transformer."""
        return self.list_streams.get(block_name.partition(".")[0], self.streams)

    def block_argument(self, name: str) -> str:
        """Return the name of blocks for "hidden_states" or "encoder_hidden_states"."""
        return self.block_arguments.get(name, name)

    @property
    def is_packed(self) -> bool:
        """Whether text, sound and video are one stream."""
        return self.latents == "packed"

    @property
    def latent_channel_dim(self) -> int:
        """The channel dimension of the latents of one video."""
        return {"channels first": 0, "channels last": 3}.get(self.latents, 1)


@dataclass(frozen=True, kw_only=True)
class BlockLinear:
    """One linear of a transformer, inside a block unless its role says otherwise.

    Attributes:
        name: Full name in the transformer, "transformer_blocks.3.attn1.to_q"; see `common.components.full_name`.
        inner_name: Name inside its block, "attn1.to_q"; of "outer", in the transformer.
        block: Index of its block, counted over all block lists in the order in which they run; `OUTSIDE` for "outer".
        role: "modulation" for the adaLN linears, "outer" for those outside the blocks, else "linear".
        sees_text: Whether it sees text tokens alone.
        sees_audio: Whether it sees audio tokens alone.
    """

    name: str
    inner_name: str
    block: int
    role: Role
    in_features: int
    out_features: int
    has_bias: bool
    sees_text: bool = False
    sees_audio: bool = False


def token_layout(transformer: nn.Module, family: Family) -> TokenLayout:
    """Return how a transformer, maybe on the meta device, makes a sequence of tokens of its arguments."""
    text: Literal["before", "after", "apart"] = "apart"
    if family.is_packed:
        text = "before"
    elif len(family.joint_order) > 1:
        text = "before" if family.joint_order[0] == "encoder_hidden_states" else "after"
    return TokenLayout(latents=family.latents, patch=token_patch(transformer), text=text)


def token_patch(transformer: nn.Module) -> tuple[int, int, int]:
    """Return how many latent frames, rows and columns make a token of a transformer."""
    patch, frames = transformer.config.patch_size, getattr(transformer.config, "patch_size_t", None)
    if isinstance(patch, int):
        return frames or 1, patch, patch
    first, height, width = patch
    return int(first), int(height), int(width)


def block_names(transformer: nn.Module, family: Family) -> list[str]:
    """Return the blocks' full names, "transformer_blocks.0" and so on, in the order in which they run."""
    names = []
    for block_list in family.block_lists:
        blocks = getattr(transformer, block_list, None)
        if not isinstance(blocks, nn.ModuleList):
            raise InvalidInputError(
                f"{type(transformer).__name__} has no block list {block_list!r}; expected a {family.transformer_class}"
            )
        names += [f"{block_list}.{index}" for index in range(len(blocks))]
    return names


def block_linears(transformer: nn.Module, family: Family) -> list[BlockLinear]:
    """List the linears inside the blocks except `kept_linears`, block by block, in the order of the modules."""
    return [
        linear
        for index, name in enumerate(block_names(transformer, family))
        for linear in linears_of_block(transformer.get_submodule(name), name, family, index=index)
    ]


def linears_of_block(block: nn.Module, block_name: str, family: Family, *, index: int = 0) -> list[BlockLinear]:
    """List the linears of one block except `kept_linears`, in the order of its modules; its name is "blocks.0", say."""
    return [
        _described(module, f"{block_name}.{name}", inner_name=name, family=family, block=index)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name not in family.kept_linears
    ]


def outer_linears(transformer: nn.Module, family: Family) -> list[BlockLinear]:
    """List the linears outside the blocks: text projection, token refiner, timestep embedding, output modulation.

    Those that read or return latents are not listed, nor are parts that the class keeps in fp32: what keeps its
    precision on purpose is not quantized.
    """
    blocks = tuple(f"{name}." for name in family.block_lists)
    kept = kept_in_fp32(transformer)
    return [
        _described(module, name, inner_name=name, family=family, block=OUTSIDE)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and not name.startswith(blocks)
        and name not in family.latent_linears
        and not is_within(name, kept)
    ]


def _described(linear: nn.Linear, name: str, *, inner_name: str, family: Family, block: int) -> BlockLinear:
    role: Role = "outer" if block == OUTSIDE else "modulation" if inner_name in family.modulation else "linear"
    return BlockLinear(
        name=name,
        inner_name=inner_name,
        block=block,
        role=role,
        in_features=linear.in_features,
        out_features=linear.out_features,
        has_bias=linear.bias is not None,
        sees_text=role == "linear" and inner_name in family.text_linears,
        sees_audio=role == "linear" and inner_name in family.audio_linears,
    )
