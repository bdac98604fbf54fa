"""Division of the denoising steps between the transformers of a pipeline.

Where there are two (Wan 2.2 A14B), the first takes the timesteps from `boundary_ratio` times the scheduler's number of
timesteps on, and the second those below.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from s2q.common.components import TRANSFORMERS, transformers_of
from s2q.common.errors import InvalidInputError
from s2q.generation.exclusive import exclusive
from s2q.generation.schedulers import scheduler_of

if TYPE_CHECKING:
    from s2q.generation.settings import GenerationSettings


def steps_of_transformers(pipe: Any, settings: GenerationSettings) -> dict[str, int]:
    """Count the denoising steps that each transformer takes, by component; 0 for one that is never called."""
    first, second = TRANSFORMERS
    num_inference_steps = settings.num_inference_steps
    below, boundary = 0, pipe.config.get("boundary_ratio")
    if boundary is not None:
        with exclusive(pipe):
            scheduler = copy.deepcopy(scheduler_of(pipe, settings))
        scheduler.set_timesteps(num_inference_steps)
        below = int((scheduler.timesteps < boundary * scheduler.config.num_train_timesteps).sum())
    present = transformers_of(pipe)
    if below and second not in present:
        raise InvalidInputError(
            f"{type(pipe).__name__}: boundary_ratio={boundary:g} leaves {below} of {num_inference_steps} steps to a "
            f"{second}, which it does not have; add it, or set boundary_ratio to null in model_index.json"
        )
    steps = {first: num_inference_steps - below, second: below}
    return {component: steps[component] for component in present}
