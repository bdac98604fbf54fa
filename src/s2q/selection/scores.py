"""Salience of candidates: diffusion and quantization salience (S²Q-VDiT, eq. 3, 6, 7 and 8).

    C_diff(x_t)  = ‖x_t - x_{t-1}‖² / ‖x_t‖²       x_{t-1} the next, less noisy latent
    C_quant(x_t) = ‖x_tᵀ x_t‖₂                     x_t as tokens × channels: the spectral norm of a C × C matrix
    C̃ = (C - min C) / (max C - min C) over the pool,    C_SDS = C̃_diff · C̃_quant

A candidate is one denoising step of one prompt. Scores are computed in fp64.

Legend: `C` latent channels, `T` latent tokens (voxels), `P` candidates of the pool.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2q.common.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One denoising step of one prompt, both by index (step 0 is pure noise), with its C_diff and C_quant."""

    prompt: int
    step: int
    timestep: float
    diffusion: float
    quantization: float


@dataclass(frozen=True, kw_only=True)
class CandidatePool:
    """All candidates of a run, in order of prompt and then of step.

    Raises:
        InvalidInputError: If there is none, one appears twice, or a score is NaN, infinite or negative.
    """

    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        """Check the scores."""
        if not self.candidates:
            raise InvalidInputError("candidate pool: it is empty; calibration needs at least one prompt and one step")
        seen = set()
        for candidate in self.candidates:
            where = f"candidate pool: prompt {candidate.prompt}, step {candidate.step}"
            if (candidate.prompt, candidate.step) in seen:
                raise InvalidInputError(f"{where} appears twice")
            seen.add((candidate.prompt, candidate.step))
            for name, score in (("diffusion", candidate.diffusion), ("quantization", candidate.quantization)):
                if not 0 <= score < float("inf"):
                    raise InvalidInputError(f"{where}: its {name} salience is {score}; expected finite, at least 0")

    def __len__(self) -> int:
        return len(self.candidates)

    @property
    def prompts(self) -> tuple[int, ...]:
        """The prompts that have candidates, in rising order."""
        return tuple(sorted({candidate.prompt for candidate in self.candidates}))

    @property
    def diffusion_salience(self) -> tuple[float, ...]:
        """C̃_diff of each candidate, 0 to 1 (eq. 7)."""
        return min_max([candidate.diffusion for candidate in self.candidates])

    @property
    def quantization_salience(self) -> tuple[float, ...]:
        """C̃_quant of each candidate, 0 to 1 (eq. 7)."""
        return min_max([candidate.quantization for candidate in self.candidates])

    @property
    def salience(self) -> tuple[float, ...]:
        """C_SDS of each candidate, 0 to 1 (eq. 8)."""
        pairs = zip(self.diffusion_salience, self.quantization_salience, strict=True)
        return tuple(diffusion * quantization for diffusion, quantization in pairs)

    def of_prompt(self, prompt: int) -> list[int]:
        """Return the indices of a prompt's candidates, from the noisiest step on."""
        indices = [index for index, candidate in enumerate(self.candidates) if candidate.prompt == prompt]
        return sorted(indices, key=lambda index: self.candidates[index].step)


def diffusion_salience(before: Tensor, after: Tensor) -> float:
    """Compute C_diff, how much a denoising step changes the latent (eq. 3), from x_t to x_{t-1} of the same shape.

    It is 0 for a latent of zeros that stays zero.

    Raises:
        InvalidInputError: If the shapes differ, a value is NaN or infinite, or x_t is zero and x_{t-1} is not.
    """
    if before.shape != after.shape:
        raise InvalidInputError(f"latents: got shapes {list(before.shape)} and {list(after.shape)}; expected the same")
    start, end = _finite(before), _finite(after)
    change, size = float((start - end).square().sum()), float(start.square().sum())
    if size == 0 and change > 0:
        raise InvalidInputError("latents: the latent before the step is all zero, so its relative change is undefined")
    return change / size if size > 0 else 0.0


def quantization_salience(latent: Tensor, *, channel_dim: int) -> float:
    """Compute C_quant, the spectral norm of the Levenberg-Marquardt Hessian x_tᵀ x_t (eq. 6).

    Every dimension of x_t but that of the channels counts tokens (voxels). Only a C × C matrix is formed, whatever
    their number. InvalidInputError if a value is NaN or infinite.
    """
    tokens_TC = _finite(latent).movedim(channel_dim, -1).flatten(0, -2)
    gram_CC = tokens_TC.t() @ tokens_TC
    return max(0.0, float(torch.linalg.eigvalsh(gram_CC)[-1]))


def score_trajectory(
    latents: Sequence[Tensor], timesteps: Iterable[float], *, prompt: int, channel_dim: int
) -> list[Candidate]:
    """Score every step of one video; return a candidate for each, in order.

    The latents are x_T, …, x_0, that before each step and the final one. InvalidInputError if there is not one more
    than steps, or one contains NaN or infinite values (with its place).
    """
    steps = list(timesteps)
    if len(latents) != len(steps) + 1:
        raise InvalidInputError(
            f"prompt {prompt}: got {len(latents)} latents for {len(steps)} steps; expected one more"
        )
    candidates = []
    for step, timestep in enumerate(steps):
        try:
            diffusion = diffusion_salience(latents[step], latents[step + 1])
            quantization = quantization_salience(latents[step], channel_dim=channel_dim)
        except InvalidInputError as error:
            raise InvalidInputError(f"prompt {prompt}, step {step}: {error}") from error
        scores = {"diffusion": diffusion, "quantization": quantization}
        candidates.append(Candidate(prompt=prompt, step=step, timestep=float(timestep), **scores))
    return candidates


def min_max(values: Sequence[float]) -> tuple[float, ...]:
    """Normalise scores over the pool to 0..1 (eq. 7); a constant score says nothing and becomes 1 everywhere."""
    lowest, highest = min(values), max(values)
    if lowest == highest:
        return (1.0,) * len(values)
    return tuple((value - lowest) / (highest - lowest) for value in values)


def _finite(latent: Tensor) -> Tensor:
    wide = latent.detach().double()
    if not bool(wide.isfinite().all()):
        raise InvalidInputError("latents: contain NaN or infinite values; check the model and its dtype")
    return wide
