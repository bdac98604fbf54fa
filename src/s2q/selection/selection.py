"""Selection of candidates: salient data selection and its baselines (S²Q-VDiT, section 3.2 and ablations).

Every selection is a function of a pool, a number of samples and a seed, and returns that many indices into the pool in
rising order. Equal scores go to the lower index. The seed matters only where something is random.

| name | takes |
|---|---|
| `sds` | the highest C̃_diff · C̃_quant (eq. 8) |
| `ds` | the highest C_diff |
| `qs` | the highest C_quant |
| `atop` | all timesteps of one prompt |
| `atfp` | all timesteps of five prompts |
| `rtfp` | random timesteps of five prompts |
| `coverage` | evenly spaced timesteps of every prompt, shifted from prompt to prompt; not of the paper |

The rivals are compared at equal size, so choice: "all timesteps" are evenly spaced ones where a prompt has more steps
than are wanted of it, in five prompts shifted against each other so that together they cover the timesteps. Prompts are
drawn at random, and more of them than named where they do not have enough candidates.
"""

from collections.abc import Callable, Sequence

import torch

from s2q.common.errors import InvalidInputError
from s2q.common.seeds import derive_seed
from s2q.selection.scores import CandidatePool


def sds(pool: CandidatePool, count: int, seed: int) -> list[int]:
    """Salient data selection: high in both saliences (eq. 8)."""
    return _highest(pool, count, pool.salience)


def ds(pool: CandidatePool, count: int, seed: int) -> list[int]:
    """Diffusion salience alone; see `sds`."""
    return _highest(pool, count, pool.diffusion_salience)


def qs(pool: CandidatePool, count: int, seed: int) -> list[int]:
    """Quantization salience alone; see `sds`."""
    return _highest(pool, count, pool.quantization_salience)


def atop(pool: CandidatePool, count: int, seed: int) -> list[int]:
    """All timesteps of one random prompt; see the module and `sds`."""
    return _all_timesteps(pool, count, _drawn_prompts(pool, count, at_least=1, seed=derive_seed(seed, "atop")))


def atfp(pool: CandidatePool, count: int, seed: int) -> list[int]:
    """All timesteps of five random prompts; see the module and `sds`."""
    return _all_timesteps(pool, count, _drawn_prompts(pool, count, at_least=5, seed=derive_seed(seed, "atfp")))


def rtfp(pool: CandidatePool, count: int, seed: int) -> list[int]:
    """Random timesteps of five random prompts; see the module and `sds`."""
    prompts = _drawn_prompts(pool, count, at_least=5, seed=derive_seed(seed, "rtfp", "prompts"))
    indices = [index for prompt in sorted(prompts) for index in pool.of_prompt(prompt)]
    generator = torch.Generator().manual_seed(derive_seed(seed, "rtfp", "timesteps"))
    drawn = torch.randperm(len(indices), generator=generator)[:count].tolist()
    return sorted(indices[position] for position in drawn)


def coverage(pool: CandidatePool, count: int, seed: int) -> list[int]:
    """Evenly spaced timesteps of every prompt, so that together they cover the timesteps; see the module and `sds`."""
    _check_count(pool, count)
    return _all_timesteps(pool, count, pool.prompts)


Selection = Callable[[CandidatePool, int, int], list[int]]

SELECTIONS: dict[str, Selection] = {rule.__name__: rule for rule in (sds, ds, qs, atop, atfp, rtfp, coverage)}
"""The selections by name."""

UNSCORED = frozenset({"atop", "atfp", "rtfp", "coverage"})
"""Those that read no scores: they are known before anything is generated."""


def _check_count(pool: CandidatePool, count: int) -> None:
    if count < 1:
        raise InvalidInputError(f"selection: got samples={count}; expected at least 1, usually 40")
    if count > len(pool):
        raise InvalidInputError(
            f"selection: got samples={count}, but there are only {len(pool)} candidates ({len(pool.prompts)} prompts); "
            "use fewer samples, more prompts or more inference steps"
        )


def _highest(pool: CandidatePool, count: int, scores: Sequence[float]) -> list[int]:
    _check_count(pool, count)
    ranked = sorted(range(len(pool)), key=lambda index: (-scores[index], index))
    return sorted(ranked[:count])


def _drawn_prompts(pool: CandidatePool, count: int, *, at_least: int, seed: int) -> list[int]:
    """Draw prompts in random order: the number named, and more until they have enough candidates."""
    _check_count(pool, count)
    prompts = pool.prompts
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn: list[int] = []
    available = 0
    for position in order:
        if len(drawn) >= at_least and available >= count:
            break
        drawn.append(prompts[position])
        available += len(pool.of_prompt(prompts[position]))
    return drawn


def _all_timesteps(pool: CandidatePool, count: int, prompts: Sequence[int]) -> list[int]:
    steps = [pool.of_prompt(prompt) for prompt in prompts]
    chosen: list[int] = []
    for rank, (indices, quota) in enumerate(
        zip(steps, _quotas([len(indices) for indices in steps], count), strict=True)
    ):
        shift = (rank + 0.5) / len(prompts)
        chosen += [indices[int((position + shift) * len(indices) / quota)] for position in range(quota)]
    assert len(set(chosen)) == count, (len(set(chosen)), count)
    return sorted(chosen)


def _quotas(sizes: Sequence[int], count: int) -> list[int]:
    """Share `count` as evenly as the sizes allow, what is left over going to the first."""
    quotas = [0] * len(sizes)
    while count > 0:
        open_ones = [index for index, size in enumerate(sizes) if quotas[index] < size]
        share = max(1, count // len(open_ones))
        for index in open_ones:
            taken = min(share, sizes[index] - quotas[index], count)
            quotas[index] += taken
            count -= taken
    return quotas
