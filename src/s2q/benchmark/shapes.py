"""Shapes of the products and attentions of a model, on which ops are measured.

Legend: `M` rows, `K` in features, `N` out features; `H` heads, `D` head dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from s2q.common.errors import UsageError
from s2q.models import BlockLinear, ModelSource, block_linears, family_of, resolve_model
from s2q.models.synthetic import SYNTHETIC_PREFIX, SyntheticModel, attention_heads, synthetic_model
from s2q.planning.workload import recommended_for, workload_of
from s2q.selection.options import Calibration

CPU_ROWS = 2048
"""Rows that ops are measured on where a CPU would take too long for those of a published model."""

MAX_CPU_ROWS = 4096

Subject = SyntheticModel | ModelSource
"""Subject of a benchmark: a published model by its dimensions, or a pipeline."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A linear of shape [M, K, N], and the layers that have it: "cogvideox-5b ff.net.2"."""

    shape: tuple[int, int, int]
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The attention of a block, whose tokens are queries and keys."""

    tokens: int
    heads: int
    head_dim: int
    models: tuple[str, ...]


def resolve_subject(name: str, *, variant: str | None = None) -> Subject:
    """Return what a name means: "synthetic:cogvideox-5b", an embedded name, a folder or a Hub id."""
    return synthetic_model(name) if name.startswith(SYNTHETIC_PREFIX) else resolve_model(name, variant=variant)


def layer_shapes(subjects: Sequence[Subject], *, rows: int | None) -> list[LayerShape]:
    """List the distinct shapes of the linears in blocks; adaLN linears and those of the text alone are left out.

    Without `rows`, M is the model's own. A shape of several models names all of them.
    """
    layers: dict[tuple[int, int, int], list[str]] = {}
    for subject in subjects:
        linears = list(_linears_of(subject, rows))
        largest: dict[tuple[int, int], int] = {}  # of linears that differ in rows alone, and little
        for seen, linear in linears:
            size = (linear.in_features, linear.out_features)
            largest[size] = max(seen, largest.get(size, 0))
        for _, linear in linears:
            size = (linear.in_features, linear.out_features)
            layers.setdefault((largest[size], *size), []).append(f"{subject.name} {linear.inner_name}")
    return [LayerShape(shape=shape, layers=tuple(dict.fromkeys(names))) for shape, names in layers.items()]


def attention_shapes(subjects: Sequence[Subject], *, rows: int | None) -> list[AttentionShape]:
    """List the distinct self-attentions with softmax; without `rows`, of the model's own number of tokens."""
    models: dict[tuple[int, int, int], list[str]] = {}
    for subject in subjects:
        if family_of(subject.transformer_class).linear_attention:
            continue
        is_synthetic = isinstance(subject, SyntheticModel)
        heads, head_dim = attention_heads(subject.config if is_synthetic else subject.transformer_config)
        tokens = _attention_tokens(subject) if rows is None else rows
        models.setdefault((tokens, heads, head_dim), []).append(subject.name)
    return [
        AttentionShape(tokens=tokens, heads=heads, head_dim=head_dim, models=tuple(names))
        for (tokens, heads, head_dim), names in models.items()
    ]


def subject_rows(subjects: Sequence[Subject], *, tokens: int | None, device: str) -> int | None:
    """Return how many rows ops are measured on; None for each model's own number.

    Args:
        tokens: What was asked for; None for a default.
        device: On a CPU the default is `CPU_ROWS` if a model has more than `MAX_CPU_ROWS`.
    """
    if tokens is not None or device != "cpu":
        return tokens
    return CPU_ROWS if any(_attention_tokens(subject) > MAX_CPU_ROWS for subject in subjects) else None


def source_tokens(source: ModelSource) -> tuple[int, int]:
    """Return the tokens of the video that a pipeline's makers recommend, and those of text, image and its sound."""
    pipe, workload = source.meta_pipeline(source.meta_transformers()), None
    if pipe is not None:
        workload = workload_of(pipe, Calibration(), recommended=recommended_for(source), components=None)
    if workload is None:
        raise UsageError(f"{source.name}: its configuration does not define the number of video tokens; pass --tokens")
    sound = workload.audio_tokens if family_of(source.transformer_class).is_packed else 0
    return workload.tokens, workload.conditioning_tokens + sound


def _linears_of(subject: Subject, rows: int | None) -> Iterator[tuple[int, BlockLinear]]:
    """The linears of a pipeline's blocks, or of one block of each list of a synthetic model, each with its rows."""
    if isinstance(subject, SyntheticModel):
        transformer, family = subject.meta_transformer(blocks=1), subject.family
        lists = {block_list.name: block_list for block_list in subject.block_lists}
    else:
        transformer, family, lists = subject.meta_transformer(), family_of(subject.transformer_class), {}
        rows = _attention_tokens(subject) if rows is None else rows
    for linear in block_linears(transformer, family):
        if linear.role != "modulation" and not (linear.sees_text or linear.sees_audio):
            seen = rows
            if seen is None:
                block_list = lists[linear.name.partition(".")[0]]
                seen = subject.rows(block_list, linear.inner_name, tokens=subject.tokens)
            yield seen, linear


def _attention_tokens(subject: Subject) -> int:
    """The tokens of a self-attention: those of the video, and of the text where they are in one sequence."""
    if isinstance(subject, SyntheticModel):
        joint = any(block_list.sees == "joint" for block_list in subject.block_lists)
        video, text = subject.tokens, subject.beside_video or subject.text_tokens
    else:
        family = family_of(subject.transformer_class)
        joint = len(family.joint_order) > 1 or family.is_packed
        video, text = source_tokens(subject)
    return video + text if joint else video
