"""Samples that are known before anything is generated, and how far each prompt has to be generated for them."""

from collections.abc import Mapping

from s2q.common.seeds import derive_seed
from s2q.selection.options import Calibration
from s2q.selection.scores import Candidate, CandidatePool
from s2q.selection.selection import SELECTIONS, UNSCORED

Places = Mapping[str, frozenset[tuple[int, int]]]
"""Prompt and step of each sample, by transformer."""


def known_samples(
    group: Calibration, called: Mapping[str, int], *, prompts: int, seed: int
) -> dict[str, frozenset[tuple[int, int]]] | None:
    """Return prompt and step of each sample, by transformer; None where the selection needs scores.

    Args:
        called: Steps of each transformer, in the order in which they are called; one without steps has no samples.
    """
    if group.selection not in UNSCORED:
        return None
    chosen, first = {}, 0
    for name, steps in called.items():
        places = [(prompt, first + step) for prompt in range(prompts) for step in range(steps)]
        first += steps
        unscored = {"timestep": 0.0, "diffusion": 0.0, "quantization": 0.0}
        candidates = tuple(Candidate(prompt=prompt, step=step, **unscored) for prompt, step in places)
        taken = []
        if len(candidates) >= group.samples:
            pool = CandidatePool(candidates=candidates)
            taken = SELECTIONS[group.selection](pool, group.samples, derive_seed(seed, "selection"))
        chosen[name] = frozenset(places[index] for index in taken)
    return chosen


def recorded_steps(chosen: Places | None, *, prompts: int, steps: int) -> tuple[int, ...]:
    """Return how many steps of each prompt are recorded: up to its last sample, of all where samples are unknown.

    The prompt with the latest sample is generated to its end: modulation linears are calibrated on every timestep.
    """
    if chosen is None:
        return (steps,) * prompts
    taken = frozenset[tuple[int, int]]().union(*chosen.values())
    recorded = [max((step + 1 for place, step in taken if place == prompt), default=0) for prompt in range(prompts)]
    recorded[recorded.index(max(recorded))] = steps
    return tuple(recorded)


def recorded_by_round(
    chosen: Places | None, called: Mapping[str, int], *, prompts: int, apart: bool
) -> dict[str | None, tuple[int, ...]]:
    """Return the recorded steps of each prompt in each round of a run, by transformer; None is all together.

    Args:
        called: Steps of each transformer, in the order in which they are called.
        apart: Whether each transformer has a round: the first is not generated past its steps, and the second's
            samples take the first's steps once more.
    """
    if not apart:
        return {None: recorded_steps(chosen, prompts=prompts, steps=sum(called.values()))}
    rounds: dict[str | None, tuple[int, ...]] = {}
    end = 0
    for name, steps in called.items():
        end += steps
        places = None if chosen is None else {name: chosen[name]}
        rounds[name] = recorded_steps(places, prompts=prompts, steps=end)
    return rounds
