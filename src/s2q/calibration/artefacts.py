"""The recorded calls of a prompt as an artefact of the run folder: its writer and its reader.

Legend: `S` steps, `R` guidance branches, `f` latent frames, `C` latent channels, `h`, `w` latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError
from s2q.common.run_folder import Artefact
from s2q.generation.trajectory import Trajectory

_HIDDEN = "hidden_states"


@dataclass(frozen=True, kw_only=True)
class CalibrationCall:
    """One call of the transformer with one sample, to be built when it is needed: prompt, step and branch by index.

    The last branch of guidance, which is -1 too, is the conditional one.
    """

    prompt: int
    step: int
    branch: int

    @property
    def name(self) -> str:
        """Name of the call in messages."""
        return f"prompt {self.prompt}, step {self.step}, branch {self.branch}"


@dataclass(frozen=True, kw_only=True)
class Argument:
    """A keyword argument of the calls of all steps.

    Attributes:
        content: A tensor, a tuple of tensors, or plain data.
        per_step: Whether the tensor has a first dimension S, or the tuple one tensor for each step; else it is the same
            in all steps.
        per_branch: Whether the next dimension is R, a row for each guidance branch.
    """

    content: Any
    per_step: bool = False
    per_branch: bool = False

    @classmethod
    def of(cls, name: str, values: Sequence[Any], *, branches: int | None) -> Argument:
        """Join the values of all steps.

        Args:
            branches: R; None for a tensor without rows, which may differ between steps, in its shape too.

        Raises:
            InvalidInputError: If the values differ and have no row for a sample, though they should.
        """
        first = values[0]
        if isinstance(first, tuple) and isinstance(first[0], Tensor):
            return cls(content=tuple(part.clone() for part in first))
        if not isinstance(first, Tensor):
            return cls(content=first)
        fixed = all(value is first or torch.equal(value, first) for value in values)
        per_branch = first.ndim > 0 and first.shape[0] == branches
        if not fixed and branches is None and len({value.shape for value in values}) > 1:
            return cls(content=tuple(value.clone() for value in values), per_step=True)
        if not fixed and not per_branch and branches is not None:
            raise InvalidInputError(f"calibration: argument {name} changes between steps and has no row per sample")
        content = first.clone() if fixed else torch.stack(list(values))
        return cls(content=content, per_step=not fixed, per_branch=per_branch)

    def at(self, step: int, branch: int) -> Any:
        """Return the value for one sample, a tensor with a batch dimension of 1 where it has rows."""
        content = self.content[step] if self.per_step else self.content
        return content[branch % len(content)][None] if self.per_branch else content

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return its tensors by their names in the artefact."""
        if isinstance(self.content, Tensor):
            return {f"arguments.{name}": self.content}
        return {f"arguments.{name}.{part}": self.content[part] for part in range(self.parts)}

    @property
    def parts(self) -> int:
        """Number of tensors of a tuple; 0 for anything else."""
        content = self.content
        return len(content) if isinstance(content, tuple) and isinstance(content[0], Tensor) else 0

    def to_record(self) -> dict[str, Any]:
        """Return what JSON says of it."""
        record = {"per_step": self.per_step, "per_branch": self.per_branch, "parts": self.parts}
        return record if self.parts or isinstance(self.content, Tensor) else {"value": self.content}

    @classmethod
    def load(cls, name: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Argument:
        """Read it from its record and the tensors of the artefact."""
        if "value" in record:
            return cls(content=record["value"])
        if record["parts"]:
            parts = tuple(tensors[f"arguments.{name}.{part}"] for part in range(record["parts"]))
            return cls(content=parts, per_step=record["per_step"])
        return cls(content=tensors[f"arguments.{name}"], per_step=record["per_step"], per_branch=record["per_branch"])


def to_artefact(trajectory: Trajectory, *, channel_dim: int, unbatched: Sequence[str] = ()) -> Artefact:
    """Convert the trajectory of one video to an artefact; C is dimension `channel_dim` of a latent.

    Of the arguments, `unbatched` have no rows.
    """
    calls = trajectory.calls
    branches = trajectory.branches(calls[0])
    inputs = torch.stack([call.inputs[_HIDDEN][-1] for call in calls])
    latents = inputs.narrow(1 + channel_dim, 0, trajectory.latents.shape[1 + channel_dim])
    arguments = {
        name: Argument.of(name, [call.inputs[name] for call in calls], branches=None if name in unbatched else branches)
        for name in calls[0].inputs
        if name != _HIDDEN
    }
    tensors = {
        "inputs": inputs,
        "latents": torch.cat([latents.float(), trajectory.latents]),
        "timesteps": torch.tensor([call.timestep for call in calls], dtype=torch.float64),
    }
    for name, argument in arguments.items():
        tensors |= argument.tensors(name)
    records = {name: argument.to_record() for name, argument in arguments.items()}
    transformers = [call.transformer for call in calls]
    return Artefact(tensors=tensors, stats={"branches": branches, "transformers": transformers, "arguments": records})


def call_inputs(artefact: Artefact, call: CalibrationCall) -> dict[str, Any]:
    """Build the keyword arguments of a transformer call with one sample from the artefact of its prompt, on the CPU."""
    arguments = {
        name: Argument.load(name, record, artefact.tensors).at(call.step, call.branch)
        for name, record in artefact.stats["arguments"].items()
    }
    return {_HIDDEN: artefact.tensors["inputs"][call.step][None], **arguments}
