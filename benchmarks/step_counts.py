"""Elementwise operations of a step of distillation, counted: the constants of `planning.flop`.

    python benchmarks/step_counts.py

The operations of the first block of `shapes-cogvideox` are listened to, in full precision, as a student, and in a step
with its gradient, on videos of three lengths, with the kernels that a GPU has for trainable quantization, in Triton's
interpreter. The bytes that they read and write, products left out, are an exact linear function of the weights and of
the values that go in and out of linears. A tensor counts once for each operation, also where a kernel reads it again
from a cache. Written to ``benchmarks/results/step-counts.json``.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from environment import environment
from records import rounded, write_record
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from s2q.benchmark.calibration_block import _pipeline_subject, first_block, first_optimization, first_student
from s2q.blocks.distil import block_loss
from s2q.models import resolve_model
from s2q.ops import fake_quantize, kronecker
from s2q.ops.fake_quantize import triton as kernels
from s2q.ops.fused import VARIABLE
from s2q.planning.cost import Workload, block_shapes
from s2q.planning.resolve import resolve
from s2q.recipes.load import load_recipe

RESULT = Path(__file__).parent / "results" / "step-counts.json"
RECIPES = ("s2q-w4a6", "s2q-plus-w4a6")
FRAMES = (1, 9, 17)
_LAUNCH = kernels.launch
PRODUCTS = ("aten.mm", "aten.bmm", "aten.addmm", "baddbmm", "scaled_dot", "linalg")


class Operations(TorchDispatchMode):
    """Counts operations that compute, and the bytes that those read and write that are no products."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.traffic = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or "_unsafe_view" in str(func) or "detach" in str(func):
            return result
        self.launches += 1
        if not any(name in str(func) for name in PRODUCTS):
            tensors = (leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor))
            self.traffic += sum(tensor.nbytes for tensor in tensors)
        return result

    def launch(self, *arguments: Any, **settings: Any) -> None:
        """Launch a Triton kernel, which the dispatcher does not see, and count its tensors."""
        with _disable_current_modes():  # the interpreter computes with PyTorch
            _LAUNCH(*arguments, **settings)
        self.launches += 1
        self.traffic += sum(tensor.nbytes for tensor in arguments if isinstance(tensor, torch.Tensor))


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """Return launches and traffic of a call."""
    batched = patch.object(kronecker, "_times_left", kronecker._times_left_in_batch)
    with Operations() as operations, batched, patch.object(kernels, "launch", operations.launch):
        run()
    return operations.launches, operations.traffic


def count(recipe_name: str) -> dict[str, dict[str, float]]:
    """Count one recipe: launches for each linear, bytes for each weight and for each value, of every kind of pass."""
    recipe, source = load_recipe(recipe_name), resolve_model("shapes-cogvideox")
    sizes, counts = [], {"plain": [], "student": [], "step": []}
    for frames in FRAMES:
        subject = _pipeline_subject(source, SimpleNamespace(device="cpu", generation={"num_frames": frames}))
        linears = [linear for linear in resolve(recipe, subject.linears) if linear.block == 0]
        with first_block(subject, recipe, device="cpu") as opened:
            sample, samples = opened.samples[0], opened.samples
            with torch.no_grad():
                counts["plain"].append(counted(partial(opened.work.teacher, **sample.inputs)))
            text = sample.inputs["encoder_hidden_states"].shape[1]
            optimization = first_optimization(first_student(opened), recipe)
            optimization.step(sample)
            per_pass = counted(partial(block_loss, optimization.student, samples))
            counts["student"].append(tuple(figure / len(samples) for figure in per_pass))
            counts["step"].append(counted(partial(optimization.step, sample)))
        tokens = sample.inputs["hidden_states"].shape[1]
        workload = Workload(tokens=tokens, frames=1, text_tokens=text, branches=1, rows=1, components=None)
        shape = block_shapes({"transformer": subject.transformer}, linears, workload)[0]
        values = sum(features * rows for features, rows in (*shape.inputs, *shape.outputs))
        sizes.append((sum(shape.weights), values, len(shape.weights)))
    matrix = torch.tensor([[weights, values] for weights, values, _ in sizes], dtype=torch.float64)
    result = {}
    for kind, figures in counts.items():
        traffic = torch.tensor([[moved] for _, moved in figures], dtype=torch.float64)
        weight, value = torch.linalg.lstsq(matrix, traffic).solution.flatten().tolist()
        launches = figures[0][0] / sizes[0][2]
        result[kind] = {"weight": rounded(weight), "value": rounded(value), "launches": rounded(launches)}
    return result


def main() -> None:
    """Count every recipe, write the file."""
    torch.set_num_threads(1)
    os.environ[VARIABLE] = "0"  # counted are the operations that a GPU has, not what is compiled for a CPU
    fake_quantize.BACKENDS["cpu"] = fake_quantize.BACKENDS["triton"]
    recipes = {name: count(name) for name in RECIPES}
    for name, figures in recipes.items():
        print(name, figures, flush=True)
    write_record(RESULT, {"schema_version": 1, **environment(), "recipes": recipes})


if __name__ == "__main__":
    main()
