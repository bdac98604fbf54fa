"""The learnable twin of `core.input_path`: what is applied to the input of linears while their block is distilled.

    x → u = (x - m) diag(v) → fake_quantize((u - u V Vᵀ) R; ratio), u V          T = diag(v) · R

The clip ratio is that of `nn.clip`, the estimator that of `nn.branch`.

Shapes: `I/O` in/out features, `N` tokens, `F` frames that there are scales for, `r` rank of the low-rank branch.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from s2q.core.input_path import PREFIX, InputPart, InputTensors, with_tensors
from s2q.core.memo import in_pieces, memoize_for
from s2q.core.schemes import QuantScheme
from s2q.core.stored_form import stored_values
from s2q.nn.branch import scaled_by_frame
from s2q.nn.simulated import simulate_quantization
from s2q.ops.activation_path.reference import apply_steps


class Estimator(nn.Module):
    """The correction while it is learned; it starts as zero.

    Attributes:
        alpha: Parameter fp32 [I].
        beta: Parameter fp32 [O].
        frames: Parameter fp32 [F], M; None where the linear sees no video.
        needs_grid: Whether it depends on where the video tokens of the call at hand are.

    Args:
        frames: F, or None.
        seed: Of α, which is uniform within 1 / √I.
    """

    def __init__(self, in_features: int, out_features: int, *, frames: int | None, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        start = (2 * torch.rand(in_features, generator=generator) - 1) / math.sqrt(in_features)
        self.alpha = nn.Parameter(start)
        self.beta = nn.Parameter(torch.zeros(out_features))
        self.frames = None if frames is None else nn.Parameter(torch.ones(frames))
        self.needs_grid = frames is not None

    def forward(self, quantized: Tensor) -> Tensor:
        """Return the correction [..., N, O] for a quantized input [..., N, I], in its dtype."""
        coefficients = scaled_by_frame((quantized.float() @ self.alpha).unsqueeze(-1), self.frames)
        return (coefficients * self.beta).to(quantized.dtype)

    def stored(self) -> dict[str, Tensor]:
        """Return what a packed linear stores of it, by name."""
        tensors: dict[str, Tensor] = {"estimator_input": self.alpha, "estimator_output": self.beta}
        return tensors if self.frames is None else tensors | {"estimator_frames": self.frames}


class InputTransform(Protocol):
    """Interface of a transform T = diag(v) · R in a student; those of `s2q.transforms` implement it."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x T."""

    def scaled(self, x: Tensor) -> Tensor:
        """Return x diag(v)."""

    def rotated(self, x: Tensor) -> Tensor:
        """Return x R."""

    def fold_inverse(self, weight: Tensor, *, dtype: torch.dtype = ...) -> Tensor:
        """Return W T⁻ᵀ in `dtype`."""

    def unscaled(self, weight: Tensor, *, dtype: torch.dtype = ...) -> Tensor:
        """Return W diag(1/v) in `dtype`."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Return what is stored of it: scale, left, right."""


class SplitInput(NamedTuple):
    """An input on its way into a linear.

    Attributes:
        quantized: [..., I], transformed and fake-quantized; dtype of the input.
        coefficients: [..., r], what the low-rank branch multiplies, or None without one.
    """

    quantized: Tensor
    coefficients: Tensor | None


class StudentInput(nn.Module):
    """The way of an input into its linears: shift, transform, then fake quantization, of each token or cube by itself.

    Attributes:
        shift: Buffer [I], m, or None for zero.
        transform: T = diag(v) · R, or None for the identity.
        low_rank_basis: Buffer [I, r], V, directions of the shifted and scaled input that are not quantized, or None.
        low_rank_from: Out of what the branch is taken: "input", "weight" or "both".
        clip: Returns its ratio, a `LearnableClip` for example; None for 1.
        scheme: How the input is quantized; None only transforms it (weight-only).
        piece: Tokens whose way to the quantized input the backward pass computes again at a time; None keeps it.
        cube_frames: Frames of the cubes of video tokens that the scheme quantizes together, which depends on where
            those of the call at hand are (`core.tokens`); None if it quantizes each token by itself.
        steps: Parts with `InputPart.apply`.
        tensors: Those of their tensors that belong to the input, by stored name.

    Args:
        weight: That of one of the linears, [O, I], from which the tensors of `steps` start.
    """

    shift: Tensor | None
    low_rank_basis: Tensor | None

    def __init__(
        self,
        scheme: QuantScheme | None,
        *,
        shift: Tensor | None = None,
        transform: InputTransform | None = None,
        low_rank_basis: Tensor | None = None,
        low_rank_from: Literal["input", "weight", "both"] = "input",
        clip: nn.Module | None = None,
        steps: Sequence[InputPart] = (),
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.steps = tuple(steps)
        self.tensors = start_tensors(steps, weight, of_linear=False)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("low_rank_basis", low_rank_basis, persistent=False)
        self.transform = transform
        self.low_rank_from = low_rank_from
        self.clip = clip
        self.piece: int | None = None
        self.cube_frames = None if scheme is None or scheme.delta is None else scheme.delta.cube[0]

    @property
    def deflates(self) -> bool:
        """Whether what goes through a branch is taken out of what is quantized."""
        return self.low_rank_basis is None or self.low_rank_from != "weight"

    @property
    def reduces_weights(self) -> bool:
        """Whether what goes through a branch is taken out of the weights."""
        return self.low_rank_basis is not None and self.low_rank_from != "input"

    def forward(self, x: Tensor) -> SplitInput:
        """Transform and fake-quantize x [..., I]; the linears of one call share the result within `memoization`."""
        return memoize_for(self, x, lambda: self._split(x) if self.piece is None else self._recomputed(x, self.piece))

    def _recomputed(self, x: Tensor, piece: int) -> SplitInput:
        """`_split`, computed again in the backward pass."""
        pieces = list(in_pieces(self._split, x, piece=piece, cube_frames=self.cube_frames))
        if len(pieces) == 1:
            return pieces[0]
        quantized, coefficients = zip(*pieces, strict=True)
        joined = None if coefficients[0] is None else torch.cat(coefficients, dim=1)
        return SplitInput(torch.cat(quantized, dim=1), joined)

    def _split(self, x: Tensor) -> SplitInput:
        centred = x if self.shift is None else x - self.shift
        coefficients = None
        if self.low_rank_basis is None:
            transformed = centred if self.transform is None else self.transform(centred)
        else:
            scaled = centred if self.transform is None else self.transform.scaled(centred)
            coefficients = scaled @ self.low_rank_basis
            rest = _less_product(scaled, coefficients, self.low_rank_basis.t()) if self.deflates else scaled
            transformed = rest if self.transform is None else self.transform.rotated(rest)
        ratio = None if self.clip is None else self.clip()
        path = InputTensors(clip_ratio=ratio, steps=with_tensors(self.steps, dict(self.tensors)))
        if path.steps:
            transformed, coefficients = apply_steps(transformed, path, coefficients)
        return SplitInput(simulate_quantization(transformed, self.scheme, path).to(x.dtype), coefficients)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """Return what packed linears store of their input, by name."""
        tensors: dict[str, Tensor] = {}
        if self.shift is not None:
            tensors["input_shift"] = self.shift
        if self.transform is not None:
            tensors |= {PREFIX + name: value for name, value in self.transform.state_tensors().items()}
        if self.low_rank_basis is not None:
            tensors["low_rank_basis"] = stored_values("low_rank_basis", self.low_rank_basis)
        if self.clip is not None:
            tensors["activation_clip"] = self.clip().detach().reshape(1).clone()
        return tensors | {name: stored_values(name, tensor) for name, tensor in self.tensors.items()}


def _less_product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Subtract a product from x [..., I] in one operation."""
    rows, factors = x.reshape(-1, x.shape[-1]), left.reshape(-1, left.shape[-1])
    return torch.addmm(rows, factors, right, alpha=-1).view(x.shape)


def start_tensors(steps: Sequence[InputPart], weight: Tensor | None, *, of_linear: bool) -> nn.ParameterDict:
    """Return the tensors that parts with `apply` start from, by stored name: all of an input, the learned of a linear.

    Args:
        weight: Folded, [O, I]; None where there is no part.
        of_linear: Whether those of a linear or those of its input.
    """
    tensors = nn.ParameterDict()
    for part in steps:
        for name, stored in part.tensors.items():
            if stored.of_linear == of_linear and (stored.learned or not of_linear):
                assert stored.start is not None
                assert weight is not None
                tensors[name] = nn.Parameter(stored.start(weight.detach()), requires_grad=stored.learned)
    return tensors
