"""The floating-point branch of a quantized linear: coefficients [M, r] times weights [O, r], added to the output.

The columns are those of the low-rank branch, of parts with `InputPart.apply`, and one of the estimator, Q-VDiT's
token-aware quantization estimator (TQE), a correction of rank one with a scale for each frame:

    X Wᵀ ≈ Q(X) Q(W)ᵀ + Δ̂ βᵀ,    Δ̂ = M_i · Q(X) α        in the rows of frame i; in those of text M is 1

(Feng et al., "Q-VDiT: Towards Accurate Quantization and Distillation of Video-Generation Diffusion Transformers", 2025,
section 3.2.) Q(X) is the quantized input, after the transforms of the linear.

Example, I = O = 1, α = 2, β = 0.5, M = [1, 3], a token a frame: Q(X) = [4, 5] is corrected by [4, 15].

Shapes: `M`, `N` tokens, `I/O` in/out features, `r` rank, `F` frames that there are scales for.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from s2q.core.tokens import current_grid
from s2q.nn.stored import StoredLinear


def float_branch(
    layer: StoredLinear, coefficients: Tensor | None, project: Callable[[Tensor], Tensor], rows: torch.Size
) -> tuple[Tensor | None, Tensor | None]:
    """Return coefficients and weights of everything that is multiplied in floating point.

    Args:
        coefficients: Of the low-rank branch and of parts with `apply`, [M, r], or None.
        project: Returns what the quantized input is times α [I, 1], as fp32 [M, 1].
        rows: The leading dimensions of the input; their product is M.

    Returns:
        [M, r] and [O, r], r with the estimator's column, or None twice.
    """
    weights = None if coefficients is None else branch_weight(layer, layer.low_rank_weight)
    if not layer.path.estimator:
        return coefficients, weights
    assert layer.estimator_input is not None
    assert layer.estimator_output is not None
    projected = project(layer.estimator_input.unsqueeze(1)).reshape(*rows, 1)
    inputs = scaled_by_frame(projected, layer.estimator_frames).reshape(-1, 1)
    output = layer.estimator_output.unsqueeze(1)
    if coefficients is None or weights is None:
        return inputs, output
    return torch.cat([coefficients.float(), inputs], dim=1), torch.cat([weights.float(), output], dim=1)


def branch_weight(layer: StoredLinear, low_rank_weight: Tensor | None) -> Tensor | None:
    """Return what multiplies coefficients, [O, r]: columns of the low-rank branch, [O, k] or None, then of other parts.

    It is None where there are none.
    """
    columns = [getattr(layer, name) for part in layer.path.steps for name in part.linear_names]
    if not columns:
        return low_rank_weight
    columns = columns if low_rank_weight is None else [low_rank_weight, *columns]
    return torch.cat([column.float() for column in columns], dim=1)


def with_float_branch(
    layer: StoredLinear, output: Tensor, coefficients: Tensor | None, x: Tensor, rows: torch.Size
) -> Tensor:
    """Add `float_branch` of a quantized input x, [..., I], to an output, [M, O]; fp32 if there is any."""
    flat = None if coefficients is None else coefficients.reshape(len(output), -1).float()
    branch_input, branch_weight = float_branch(
        layer, flat, lambda alpha: x.reshape(len(output), -1).float() @ alpha, rows
    )
    if branch_input is None or branch_weight is None:
        return output
    return output.float() + F.linear(branch_input, branch_weight.float())


def scaled_by_frame(coefficients: Tensor, frames: Tensor | None) -> Tensor:
    """Multiply what belongs to the tokens of a frame by its scale; text tokens are unchanged.

    A call of another number of frames has the scales between, drawn straight through those there are; one whose grid
    (`core.tokens`) is not known, or is not that of the coefficients, has none.

    Args:
        coefficients: [..., N, r].
        frames: fp32 [F], or None for 1.

    Returns:
        [..., N, r].
    """
    grid = None if frames is None else current_grid()
    if frames is None or grid is None or coefficients.ndim < 3:
        return coefficients
    length = coefficients.shape[-2]
    offset = grid.offset(length)
    if offset is None:
        return coefficients
    if len(frames) != grid.frames:
        frames = F.interpolate(frames.view(1, 1, -1), size=grid.frames, mode="linear", align_corners=True).view(-1)
    of_video = frames.repeat_interleave(grid.height * grid.width)
    factors = F.pad(of_video, (offset, length - offset - grid.tokens), value=1.0)
    return coefficients * factors.unsqueeze(-1)
