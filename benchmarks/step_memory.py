"""What a step of distillation holds, traced without computing, against the formula that plans use.

    python benchmarks/step_memory.py

A block of each published size runs forward and backward on the meta device, where tensors have shapes and no storage,
while every live tensor is counted: plain and checkpointed, in fp32 and bf16. Attention counts as a fused
kernel does, by its inputs and its output. Written to ``benchmarks/results/step-memory.json``.
"""

import weakref
from collections.abc import Iterator, Sequence
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

from s2q.benchmark.calibration_block import student_of
from s2q.benchmark.synthetic_blocks import block_inputs
from s2q.blocks.distil import checkpoint_parts
from s2q.common.components import TRANSFORMERS
from s2q.core.memo import memoization
from s2q.distillation.loss import weighted_token_loss
from s2q.models.family import block_linears, linears_of_block
from s2q.models.synthetic import BlockList, SyntheticModel, synthetic_model
from s2q.planning.cost import Workload, block_shapes
from s2q.recipes.load import load_recipe
from s2q.recipes.schema import Recipe
from s2q.rounding import soft_rounding

MODELS = ("cogvideox-2b", "cogvideox-5b", "hunyuanvideo", "ltx-2b", "wan-1.3b", "wan-14b")
TOKENS = (256, 4096, 32_768, 131_072)
RECIPE = "s2q-w4a6"
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
        """Count a tensor that is there already.

        Args:
            tensor: Counted once, however many views it has.
        """
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


@contextmanager
def _without_storage() -> Iterator[None]:
    """Fused attention, and random numbers that need no generator."""

    def empty(*shape: int, generator: Any = None, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    with (
        patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention),
        patch.object(torch, "randn", empty),
    ):
        yield


class _Nowhere:
    device = torch.device("meta")


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
    """Return what a step holds at most beside the block's weights and the sample.

    Args:
        case: The step.
    """
    model, block_list = case.model, case.block_list
    transformer = model.meta_transformer(blocks=1)
    block = getattr(transformer, block_list.name)[0].to(case.dtype).requires_grad_(False)
    prefix = f"{block_list.name}.0"
    linears = {one.name.removeprefix(f"{prefix}."): one for one in linears_of_block(block, prefix, model.family)}
    student = student_of(block, linears, case.recipe)
    with _without_storage():
        nowhere: Any = _Nowhere()
        inputs = block_inputs(model, block_list, tokens=case.tokens, generator=nowhere, dtype=case.dtype, batch=1)
        inputs |= {"attention_mask": None} if "attention_mask" in inputs else {}
        with LiveBytes() as live:
            for leaf in [*student.parameters(), *student.buffers(), *tree_leaves(inputs)]:
                if isinstance(leaf, Tensor):
                    live.add(leaf.data if leaf.is_leaf else leaf)
            before = live.now
            repeats = checkpoint_parts(student) if case.recompute else nullcontext()
            with repeats, soft_rounding(student), torch.enable_grad(), memoization():
                outputs = student(**inputs)
                streams: Sequence[Tensor] = outputs if isinstance(outputs, tuple) else (outputs,)
                weighted_token_loss(streams, tuple(torch.zeros_like(one) for one in streams)).backward()
            return live.peak - before


def planned_bytes(case: Case) -> int:
    """Return the same by the formula of `s2q.planning.cost`.

    Args:
        case: The step.
    """
    model = case.model
    transformer = model.meta_transformer(blocks=1)
    workload = Workload(
        tokens=case.tokens, frames=model.frames, text_tokens=model.text_tokens, branches=1, rows=1, component_bytes=None
    )
    shapes = block_shapes({TRANSFORMERS[0]: transformer}, block_linears(transformer, model.family), workload)
    shape = shapes[model.block_lists.index(case.block_list)]
    return shape.step_bytes(case.recipe, checkpointed=case.recompute, itemsize=case.dtype.itemsize)


def cases(recipe: Recipe) -> Iterator[Case]:
    """Go through every size, without and with checkpointing.

    Args:
        recipe: A recipe that distils.

    Yields:
        Steps.
    """
    models = [synthetic_model(name) for name in MODELS]
    blocks = [(model, block_list) for model in models for block_list in model.block_lists]
    for (model, block_list), tokens, dtype, recompute in product(
        blocks, TOKENS, (torch.float32, torch.bfloat16), (False, True)
    ):
        yield Case(model=model, block_list=block_list, recipe=recipe, tokens=tokens, dtype=dtype, recompute=recompute)


def main() -> None:
    """Trace every size and write the file."""
    rows = []
    for case in cases(load_recipe(RECIPE)):
        traced, planned = traced_bytes(case), planned_bytes(case)
        row = {"model": case.model.name, "blocks": case.block_list.name, "tokens": case.tokens}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "checkpointed": case.recompute}
        rows.append(row | {"traced_bytes": traced, "planned_bytes": planned})
        print(*row.values(), f"{traced / 1e9:.2f} GB, planned {planned / traced:.2f} of it", flush=True)
    ratios = [row["planned_bytes"] / row["traced_bytes"] for row in rows]
    write_record(RESULT, {"schema_version": 1, **environment(), "recipe": RECIPE, "rows": rows})
    print(f"planned over traced: {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
