"""A linear while its block is distilled: transformed, clipped, fake-quantized; its weight is fixed.

    y = fake_quantize((x - m) T; ratio_x) · fake_quantize(W T⁻ᵀ; ratio_w)ᵀ + (b + W m)

With T = diag(v) · R and a low-rank branch V, u = (x - m) diag(v) is quantized as (u - u V Vᵀ) R, and (u V) Lᵀ with
L = W diag(1/v) V is added in floating point. A branch that is taken from the weight does not change u: quantized are
then u R and (W - L Vᵀ diag(v)) T⁻ᵀ. It may be taken from both, since (u - u V Vᵀ) V = 0. An estimator adds its
correction. Linears that read the same x share one `StudentInput`, so that they share m, T, V and ratio_x. What is
trained is in the parameters: of the transform, of the clips and of the estimator.

Shapes: `I` in features, `O` out features, `G` groups, `r` rank of the low-rank branch.
"""

from typing import Literal, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2q.common.errors import InvalidInputError
from s2q.core.codebook import levels_of
from s2q.core.memo import checkpointed, memoize_for, memoize_step
from s2q.core.qparams import fake_quantize_input, fake_quantize_weight, weight_scale
from s2q.core.schemes import LinearScheme, PerGroup, QuantScheme, num_groups
from s2q.core.tokens import current_grid
from s2q.nn.clip import START, LearnableClip
from s2q.nn.estimator import Estimator
from s2q.nn.stored import PACKED_DTYPES


class InputTransform(Protocol):
    """Interface of a transform T = diag(v) · R in a student; those of `s2q.transforms` implement it."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x T."""
        ...

    def scaled(self, x: Tensor) -> Tensor:
        """Return x diag(v)."""
        ...

    def rotated(self, x: Tensor) -> Tensor:
        """Return x R."""
        ...

    def fold_inverse(self, weight: Tensor, *, dtype: torch.dtype = ...) -> Tensor:
        """Return W T⁻ᵀ in `dtype`."""
        ...

    def unscaled(self, weight: Tensor, *, dtype: torch.dtype = ...) -> Tensor:
        """Return W diag(1/v) in `dtype`."""
        ...


class SplitInput(NamedTuple):
    """An input on its way into a linear.

    Attributes:
        quantized: [..., I], transformed and fake-quantized; dtype of the input.
        coefficients: [..., r], what the low-rank branch multiplies, or None without one.
    """

    quantized: Tensor
    coefficients: Tensor | None


class StudentInput(nn.Module):
    """The way of an input into its linears: shift, transform, then fake quantization, each token by itself.

    Attributes:
        shift: Buffer [I], m, or None for zero.
        transform: T = diag(v) · R, or None for the identity.
        low_rank_basis: Buffer [I, r], V, or None without a low-rank branch.
        low_rank_from: Out of what the branch is taken: "input", "weight" or "both".
        clip: Returns its ratio, a `LearnableClip` for example; None for 1.
        scheme: How the input is quantized; None only transforms it (weight-only).
        recomputes: Whether the backward pass computes the way to the quantized input again instead of keeping it.
        needs_grid: Whether the scheme depends on where the video tokens of the call at hand are (`core.tokens`).

    Args:
        scheme: See above.
        shift: [I], what is subtracted from the input, or None.
        transform: A module with the methods of `InputTransform`, or None.
        low_rank_basis: [I, r], the directions of the shifted and scaled input that are not quantized, or None.
        low_rank_from: See above.
        clip: Returns one ratio, or None.
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
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("low_rank_basis", low_rank_basis, persistent=False)
        self.transform = transform
        self.low_rank_from = low_rank_from
        self.clip = clip
        self.recomputes = False
        self.needs_grid = scheme is not None and scheme.delta is not None

    @property
    def deflates(self) -> bool:
        """Whether what goes through a branch is taken out of what is quantized."""
        return self.low_rank_basis is None or self.low_rank_from != "weight"

    @property
    def reduces_weights(self) -> bool:
        """Whether what goes through a branch is taken out of the weights."""
        return self.low_rank_basis is not None and self.low_rank_from != "input"

    def forward(self, x: Tensor) -> SplitInput:
        """Transform and fake-quantize; the linears of one call share the result within `memoization`.

        Args:
            x: [..., I], floating.
        """
        return memoize_for(self, x, lambda: checkpointed(self._split, x) if self.recomputes else self._split(x))

    def _split(self, x: Tensor) -> SplitInput:
        centred = x if self.shift is None else x - self.shift
        coefficients = None
        if self.low_rank_basis is None:
            transformed = centred if self.transform is None else self.transform(centred)
        else:
            scaled = centred if self.transform is None else self.transform.scaled(centred)
            coefficients = scaled @ self.low_rank_basis
            rest = scaled - coefficients @ self.low_rank_basis.t() if self.deflates else scaled
            transformed = rest if self.transform is None else self.transform.rotated(rest)
        if self.scheme is not None:
            ratio = None if self.clip is None else self.clip()
            grid = current_grid() if self.needs_grid else None
            transformed = fake_quantize_input(transformed, self.scheme, clip_ratio=ratio, grid=grid)
        return SplitInput(transformed.to(x.dtype), coefficients)


class StudentLinear(nn.Module):
    """A linear under distillation.

    Attributes:
        weight: Buffer [O, I], the full-precision weight; not copied.
        bias: Buffer [O] or None; b + W m where the input is shifted.
        scheme: How weight and input are quantized.
        source: Transform and quantization of the input, shared by the linears that read it.
        recomputes: Whether the backward pass computes the quantized weight again, which takes less memory than keeping
            the way to it.
        weight_clip: Ratio of each output channel, or None for 1.
        estimator: Returns a correction of the output for the quantized input, or None.
        rounding: Returns the quantized weight, [O, I], if its rounding is learned and transform and clip are
            fixed; None rounds to nearest.

    Args:
        linear: Full precision.
        scheme: How weight and input are to be quantized.
        source: Of the scheme's activation part.
        weight_clip: Broadcasts to the scale: (O,) per channel, (O, 1) per group.
        estimator: See above.

    Raises:
        InvalidInputError: If I is not a multiple of the group size, the source quantizes by another scheme, or it
            shifts the input of a linear without bias.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        *,
        scheme: LinearScheme,
        source: StudentInput,
        weight_clip: LearnableClip | None = None,
        estimator: Estimator | None = None,
    ) -> None:
        super().__init__()
        for one in (scheme.weight, scheme.activation):
            if one is not None:
                num_groups(one, linear.in_features)
        if source.scheme != scheme.activation:
            raise InvalidInputError(f"student: its input is quantized as {source.scheme}; expected {scheme.activation}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme = scheme
        self.source = source
        self.recomputes = False
        self.weight_clip = weight_clip
        self.estimator = estimator
        self.rounding: nn.Module | None = None
        self.register_buffer("weight", linear.weight.detach(), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach()
        if source.shift is not None:
            if bias is None:
                raise InvalidInputError("student: its input is shifted; expected a linear with a bias to compensate")
            bias = bias.float() + linear.weight.detach().float() @ source.shift
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def with_clip(
        cls,
        linear: nn.Linear,
        *,
        scheme: LinearScheme,
        source: StudentInput,
        start: float = START,
        estimator: Estimator | None = None,
    ) -> Self:
        """Make a student that learns a clipping ratio for each output channel.

        Args:
            linear: Full precision.
            scheme: How weight and input are to be quantized.
            source: Of the scheme's activation part.
            start: Logit of the ratios at the start.
            estimator: A correction of the output, or None.
        """
        grouped = isinstance(scheme.weight.granularity, PerGroup)
        shape = (linear.out_features, 1) if grouped else (linear.out_features,)
        clip = LearnableClip(shape, start=start, device=linear.weight.device)
        return cls(linear, scheme=scheme, source=source, weight_clip=clip, estimator=estimator)

    def folded_weight(self, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return W T⁻ᵀ, less a low-rank branch that is taken from the weight; it is what gets quantized.

        Args:
            dtype: In which to fold; fp64 for the final rounding, fp32 does while training.

        Returns:
            fp32 [O, I], differentiable.
        """
        transform, basis, weight = self.source.transform, self.source.low_rank_basis, self.weight
        if basis is not None and self.source.reduces_weights:
            branch = self.low_rank_weight(dtype=dtype).to(dtype) @ basis.to(dtype).t()
            weight = weight.to(dtype) - (branch if transform is None else transform.scaled(branch))
        if transform is None:
            return weight.float()
        return transform.fold_inverse(weight, dtype=dtype).float()

    def low_rank_weight(self, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return L = W diag(1/v) V, what the low-rank branch multiplies its coefficients by.

        Where the branch is taken out of the weight, L is rounded as it is stored, so that what it loses stays there.

        Args:
            dtype: In which to compute; see `folded_weight`.

        Returns:
            fp32 [O, r], differentiable.
        """
        basis, transform = self.source.low_rank_basis, self.source.transform
        assert basis is not None
        weight = self.weight.to(dtype) if transform is None else transform.unscaled(self.weight, dtype=dtype)
        product = weight @ basis.to(dtype)
        return product.to(PACKED_DTYPES["low_rank_weight"]).float() if self.source.reduces_weights else product.float()

    def clip_ratio(self) -> Tensor | None:
        """Return the weight's clipping ratios, fp32 [O] or [O, 1], or None for 1."""
        return None if self.weight_clip is None else self.weight_clip()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.Linear)
        """Apply the layer.

        Args:
            input: [..., I], floating.

        Returns:
            [..., O], dtype of the input.
        """
        weight = memoize_step(self, "weight", self._weight)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        quantized, coefficients = self.source(input)
        output = F.linear(quantized, weight.to(input.dtype), bias)
        if self.estimator is not None:
            output = output + self.estimator(quantized)
        if coefficients is None:
            return output
        branch = memoize_step(self, "low_rank_weight", lambda: self.low_rank_weight(dtype=torch.float32))
        return output + F.linear(coefficients, branch).to(output.dtype)

    def _weight(self) -> Tensor:
        return checkpointed(self._quantized_weight) if self.recomputes else self._quantized_weight()

    def _quantized_weight(self) -> Tensor:
        if self.rounding is not None:
            return self.rounding()  # type: ignore[no-any-return]
        weight = self.folded_weight(dtype=torch.float32)
        scale = weight_scale(weight, self.scheme.weight, clip_ratio=self.clip_ratio())
        levels = levels_of(self.scheme.weight, self.in_features, device=weight.device)
        return fake_quantize_weight(weight, scale, num_bits=self.scheme.weight.num_bits, levels=levels)

    def extra_repr(self) -> str:
        """Return what `print` shows of the layer."""
        has_bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, {self.scheme.name}"
