"""What a step of distillation holds, traced without computing, against the formula that plans use.

    python benchmarks/step_memory.py

A block of each published size is opened as a run opens it, on the meta device, where tensors have shapes and no
storage. The gradient of a step is computed while every live tensor is counted: plain and checkpointed, in fp32 and
in bf16. Attention counts as a fused kernel does, by its inputs and its output. Written to
``benchmarks/results/step-memory.json``.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from environment import environment
from records import write_record
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from s2q.benchmark.calibration_block import first_block, first_optimization, first_student, synthetic_subject
from s2q.benchmark.synthetic_blocks import block_grid
from s2q.blocks.distil import checkpoint_parts
from s2q.common.arguments import dtype_name
from s2q.common.components import TRANSFORMERS
from s2q.models.family import block_linears
from s2q.models.synthetic import BlockList, SyntheticModel, synthetic_model
from s2q.nn import set_backend
from s2q.planning.cost import Workload, block_shapes
from s2q.recipes.load import load_recipe
from s2q.recipes.schema import Recipe

MODELS = (
    "cogvideox-2b",
    "cogvideox-5b",
    "hunyuanvideo",
    "kandinsky5-lite",
    "ltx-2",
    "ltx-2b",
    "minimax-h3",
    "sana-video-2b",
    "wan-1.3b",
    "wan-14b",
    "wan-vace-14b",
)
TOKENS = (256, 4096, 32_768, 131_072)
RECIPES = ("s2q-w4a6", "s2q-plus-w4a6", "s2q-plus-w4a4", "q-vdit-w4a6")
RESULT = Path(__file__).parent / "results" / "step-memory.json"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive.

    Attributes:
        now: Bytes at the moment.
        peak: Most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that is there already, once however many views it has."""
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _output = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return _FusedAttention.apply(query, key, value)


def _column_sums(_query: Tensor, key: Tensor, **_options: Any) -> Tensor:
    return torch.empty(key.shape[0], key.shape[2], device="meta")


class _Plausible(TorchDispatchMode):
    """Answers questions about values that are not there: conditions hold, numbers are tiny. Nothing leaves it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op, unless it asks for values."""
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool or 1e-9
        if func is torch.ops.aten.index.Tensor and getattr(args[1][0], "dtype", None) == torch.bool:
            return args[0].flatten()
        if func is torch.ops.aten._to_copy.default and args[0].is_meta:
            kwargs.pop("device", None)
        return func(*args, **kwargs)


class _Nowhere:
    device = torch.device("meta")


@contextmanager
def _without_storage() -> Iterator[None]:
    """Values that are not asked for, and random numbers that need no generator."""

    def empty(*shape: int, generator: Any = None, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    with (
        patch.object(torch, "randn", empty),
        patch("s2q.distillation.token_importance.attention_colsum", _column_sums),
        _Plausible(),
    ):
        yield


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of distillation.

    Attributes:
        model: The dimensions.
        block_list: Which of its blocks.
        recipe: A recipe that distils.
        tokens: Video tokens.
        dtype: Of calibration.
        recompute: Whether the step is checkpointed.
    """

    model: SyntheticModel
    block_list: BlockList
    recipe: Recipe
    tokens: int
    dtype: torch.dtype
    recompute: bool


def traced_bytes(case: Case) -> int:
    """Return what a step holds at most beside the block's weights and the sample."""
    block = getattr(case.model.meta_transformer(blocks=1), case.block_list.name)[0].to(case.dtype).requires_grad_(False)
    nowhere: Any = _Nowhere()
    with _without_storage():
        subject = synthetic_subject(
            case.model, case.block_list, block, tokens=case.tokens, generator=nowhere, dtype=case.dtype, samples=1
        )
        recipe = _in_dtype(case.recipe, case.dtype)
        with first_block(subject, recipe, device="meta") as opened:
            student, sample = first_student(opened), opened.samples[0]
            set_backend(student, "reference")
            optimization = first_optimization(student, recipe)
            with LiveBytes() as live, checkpoint_parts(student) if case.recompute else nullcontext():
                held = [*student.parameters(), *student.buffers(), *tree_leaves((sample.inputs, sample.outputs))]
                for leaf in [*held, *tree_leaves(sample.weights)]:
                    if isinstance(leaf, Tensor):
                        live.add(leaf.detach())
                before = live.now
                with patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention):
                    optimization.gradient(sample)
                return live.peak - before


def _in_dtype(recipe: Recipe, dtype: torch.dtype) -> Recipe:
    precision = "float32" if dtype == torch.float32 else "model"
    return load_recipe(recipe, overrides=[f"calibration.precision={precision}"])


def planned_bytes(case: Case) -> int:
    """Return the same by the formula of `s2q.planning.cost`."""
    model = case.model
    transformer = model.meta_transformer(blocks=1)
    workload = Workload(
        tokens=case.tokens,
        frames=block_grid(model, tokens=case.tokens).frames,
        text_tokens=model.text_tokens,
        audio_tokens=model.audio_tokens,
        image_tokens=model.image_tokens,
        branches=1,
        rows=1,
        components=None,
    )
    shapes = block_shapes({TRANSFORMERS[0]: transformer}, block_linears(transformer, model.family), workload)
    shape = shapes[model.block_lists.index(case.block_list)]
    return shape.step_bytes(case.recipe, checkpointed=case.recompute, itemsize=case.dtype.itemsize)


def cases(recipe: Recipe) -> Iterator[Case]:
    """Go through every size, without and with checkpointing."""
    models = [synthetic_model(name) for name in MODELS]
    blocks = [(model, block_list) for model in models for block_list in model.block_lists]
    for (model, block_list), tokens, dtype, recompute in product(
        blocks, TOKENS, (torch.float32, torch.bfloat16), (False, True)
    ):
        yield Case(model=model, block_list=block_list, recipe=recipe, tokens=tokens, dtype=dtype, recompute=recompute)


def main() -> None:
    """Trace every size and write the file."""
    rows = []
    for recipe in map(load_recipe, RECIPES):
        for case in cases(recipe):
            traced, planned = traced_bytes(case), planned_bytes(case)
            row = {"recipe": recipe.name, "model": case.model.name, "blocks": case.block_list.name}
            row |= {"tokens": case.tokens, "dtype": dtype_name(case.dtype)}
            rows.append(row | {"checkpointed": case.recompute, "traced_bytes": traced, "planned_bytes": planned})
            print(*rows[-1].values(), f"planned {planned / traced:.2f} of it", flush=True)
    write_record(RESULT, {"schema_version": 1, **environment(), "rows": rows})
    for name in RECIPES:
        ratios = [row["planned_bytes"] / row["traced_bytes"] for row in rows if row["recipe"] == name]
        print(f"{name}: planned over traced {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
