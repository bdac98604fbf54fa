"""Shapes of the products and attentions of a model, on which ops are measured.

Legend: `M` rows, `K` in features, `N` out features; `H` heads, `D` head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from s2q.common.errors import UsageError
from s2q.models import ModelSource, block_linears, family_of, linears_of_block, resolve_model
from s2q.models.synthetic import SYNTHETIC_PREFIX, SyntheticModel, synthetic_model
from s2q.planning.workload import workload_of_source
from s2q.selection.options import Calibration

CPU_ROWS = 2048
"""Rows that ops are measured on where a CPU would take too long for those of a published model."""

MAX_CPU_ROWS = 4096

Subject = SyntheticModel | ModelSource
"""Subject of a benchmark: a published model by its dimensions, or a pipeline."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A linear that occurs in blocks.

    Attributes:
        shape: [M, K, N].
        layers: Where, "cogvideox-5b ff.net.2".
    """

    shape: tuple[int, int, int]
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The attention of a block.

    Attributes:
        tokens: Queries, as many as keys.
    """

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
    found: dict[tuple[int, int, int], LayerShape] = {}
    for subject in subjects:
        for one in _largest_rows(_linears_of(subject, rows)):
            before = found[one.shape].layers if one.shape in found else ()
            found[one.shape] = LayerShape(shape=one.shape, layers=tuple(dict.fromkeys((*before, *one.layers))))
    return list(found.values())


def attention_shapes(subjects: Sequence[Subject], *, rows: int | None) -> list[AttentionShape]:
    """List the distinct self-attentions; without `rows`, of the model's own number of tokens."""
    found: dict[tuple[int, int, int], AttentionShape] = {}
    for subject in subjects:
        name, heads, head_dim, tokens = _attention_of(subject, rows)
        key = (tokens, heads, head_dim)
        models = (*found[key].models, name) if key in found else (name,)
        found[key] = AttentionShape(tokens=tokens, heads=heads, head_dim=head_dim, models=models)
    return list(found.values())


def subject_rows(subjects: Sequence[Subject], *, tokens: int | None, device: str) -> int | None:
    """Return how many rows ops are measured on; None for each model's own number.

    Args:
        tokens: What was asked for; None for a default.
        device: On a CPU the default is `CPU_ROWS` if a model has more than `MAX_CPU_ROWS`.
    """
    if tokens is not None or device != "cpu":
        return tokens
    return CPU_ROWS if any(_attention_of(one, None)[3] > MAX_CPU_ROWS for one in subjects) else None


def source_tokens(source: ModelSource) -> tuple[int, int]:
    """Return the video tokens and text tokens of the video that a pipeline's makers recommend."""
    workload = workload_of_source(source, Calibration(), transformers=source.meta_transformers())
    if workload is None:
        raise UsageError(f"{source.name}: its configuration does not define the number of video tokens; pass --tokens")
    return workload.tokens, workload.text_tokens


def _linears_of(subject: Subject, rows: int | None) -> list[LayerShape]:
    found = []
    if isinstance(subject, SyntheticModel):
        transformer = subject.meta_transformer(blocks=1)
        for block_list in subject.block_lists:
            prefix = f"{block_list.name}.0"
            for linear in linears_of_block(getattr(transformer, block_list.name)[0], prefix, subject.family):
                inner = linear.name.removeprefix(f"{prefix}.")
                if linear.role == "modulation" or inner in subject.family.text_linears:
                    continue
                own = subject.rows(block_list, inner, tokens=subject.tokens) if rows is None else rows
                shape = (own, linear.in_features, linear.out_features)
                found.append(LayerShape(shape=shape, layers=(f"{subject.name} {inner}",)))
        return found
    own, family = _attention_of(subject, rows)[3], family_of(subject.transformer_class)
    for linear in block_linears(subject.meta_transformer(), family):
        inner = linear.name.split(".", 2)[2]
        if linear.role == "modulation" or inner in family.text_linears:
            continue
        shape = (own, linear.in_features, linear.out_features)
        found.append(LayerShape(shape=shape, layers=(f"{subject.name} {inner}",)))
    return found


def _largest_rows(shapes: Sequence[LayerShape]) -> list[LayerShape]:
    """Give linears of a model that differ in rows alone, and little, the larger number."""
    largest: dict[tuple[int, ...], int] = {}
    for one in shapes:
        rows, *size = one.shape
        largest[tuple(size)] = max(rows, largest.get(tuple(size), 0))
    return [replace(one, shape=(largest[one.shape[1:]], *one.shape[1:])) for one in shapes]


def _attention_of(subject: Subject, rows: int | None) -> tuple[str, int, int, int]:
    """Name, heads, head dim and tokens of a model's self-attention."""
    if isinstance(subject, SyntheticModel):
        joint = any(one.sees == "joint" for one in subject.block_lists)
        own = subject.tokens + (subject.text_tokens if joint else 0)
        return subject.name, subject.heads, subject.head_dim, own if rows is None else rows
    config = subject.transformer_config
    if rows is None:
        video, text = source_tokens(subject)
        rows = video + (text if len(family_of(subject.transformer_class).joint_order) > 1 else 0)
    return subject.name, config["num_attention_heads"], config["attention_head_dim"], rows
