"""The scheduler of a generation: the pipeline's own, or another class, another shift, with the same configuration.

A model predicts noise or velocity of a diffusion with betas (CogVideoX), or the velocity of a flow (all others), and a
scheduler fits one of the two. The shift s moves the sigmas of a flow towards noise, σ' = s σ / (1 + (s − 1) σ);
diffusers calls it `shift` or `flow_shift`, by class.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from s2q.common.errors import InvalidInputError, unknown_name
from s2q.models import family_of

if TYPE_CHECKING:
    from s2q.generation.settings import GenerationSettings

FLOW = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
)
"""Schedulers of flow models that call the transformer once a step."""

DIFFUSION = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
"""Those of models with betas: CogVideoX shifts the signal-to-noise ratio of its betas, which other classes ignore."""

OF_ONE_MODEL = ("MiniMaxH3Scheduler",)
"""Those of one model, whose pipeline runs no other: MiniMax-H3's timesteps go from 0 for noise to 1."""

_OF_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
_DISTILLED = re.compile(
    r"lightning|turbo|fusionx|causvid|accvid|lightx2v|self[-_ ]?forcing|fast(?=wan|hunyuan|mochi|ltx|cogvideo)"
    r"|hyper[-_ ]?(?=sd|wan|hunyuan|mochi|ltx|cogvideo)"
    r"|(?<!un)(?<!un[-_ ])(?<!de)(?<!de[-_ ])(?<!non)(?<!non[-_ ])distill"
    r"|(?<![a-z])(?:lcm|dmd|rcm)(?![a-z])",
    re.IGNORECASE,
)
"""Names of step-distilled models and of their adapters: not "undistilled", "de-distilled"."""

_DISTILLED_SCHEDULERS = ("DMD", "LCM", "TCD")


def scheduler_of(pipe: Any, settings: GenerationSettings) -> Any:
    """Return the scheduler that a pipeline generates with: its own unless the settings name a class or a shift.

    Raises:
        InvalidInputError: If diffusers has no such class, or the class does not fit the pipeline.
    """
    current = pipe.scheduler
    if settings.scheduler is None and settings.shift is None:
        return current
    chosen = type(current) if settings.scheduler is None else _class_of(pipe, settings.scheduler)
    config, options = dict(current.config), _options(chosen)
    shift = _shift_of(current) if settings.shift is None else settings.shift
    if settings.shift is not None:
        if _shift_key(options) is None:
            raise InvalidInputError(f"shift: got {settings.shift:g}; a {chosen.__name__} has no shift, remove it")
        config["use_dynamic_shifting"] = False
    if _is_flow(current):
        config |= {key: value for key, value in _OF_FLOW.items() if key in options}
    if (key := _shift_key(options)) is not None and shift is not None:
        config[key] = shift
    return chosen.from_config({key: value for key, value in config.items() if key in options})


def described(scheduler: Any) -> dict[str, Any]:
    """Return the class of a scheduler and its shift, None for one without or with a shift by the size of the video."""
    dynamic = scheduler.config.get("use_dynamic_shifting", False)
    return {"scheduler": type(scheduler).__name__, "shift": None if dynamic else _shift_of(scheduler)}


def distilled_name(scheduler: str, *names: str) -> str | None:
    """Return the class of a scheduler, or another name, that belongs to a step-distilled model; None if none does."""
    if any(word in scheduler for word in _DISTILLED_SCHEDULERS):
        return scheduler
    return next((name for name in names if _DISTILLED.search(name)), None)


def _class_of(pipe: Any, name: str) -> Any:
    """The class of a scheduler that fits the pipeline."""
    import diffusers

    current = pipe.scheduler
    own = type(current).__name__
    known = (own,) if own in OF_ONE_MODEL else FLOW if _is_flow(current) else DIFFUSION
    fitting = [other for other in known if not _obstacle(pipe, getattr(diffusers, other))]
    if name not in known:
        if not (name.endswith("Scheduler") and hasattr(diffusers, name)):
            raise unknown_name("scheduler", name, fitting)
        kind = "a flow with a call a step" if _is_flow(current) else "CogVideoX's betas"
        if own in OF_ONE_MODEL:
            kind = f"as {own} does"
        raise _incompatible(pipe, name, f"it does not sample {kind}", fitting)
    chosen = getattr(diffusers, name)
    if reason := _obstacle(pipe, chosen):
        raise _incompatible(pipe, name, reason, fitting)
    return chosen


def _incompatible(pipe: Any, name: str, reason: str, fitting: list[str]) -> InvalidInputError:
    return InvalidInputError(
        f"scheduler: {name} does not fit {type(pipe).__name__}: {reason}; use {' or '.join(fitting)}"
    )


def _obstacle(pipe: Any, chosen: Any) -> str | None:
    """The reason why a pipeline cannot run a class of its kind."""
    taken = inspect.signature(chosen.set_timesteps).parameters
    for argument in family_of(pipe.transformer).timestep_arguments:
        if argument not in taken:
            return f"the pipeline sets {argument}, which it does not take"
    if pipe.scheduler.config.get("invert_sigmas") and "invert_sigmas" not in _options(chosen):
        return "the model's sigmas are inverted"
    return None


def _options(chosen: Any) -> set[str]:
    """Names of the configuration of a class."""
    return set(inspect.signature(chosen.__init__).parameters) - {"self"}


def _shift_key(options: set[str]) -> str | None:
    return next((key for key in ("flow_shift", "shift") if key in options), None)


def _shift_of(scheduler: Any) -> float | None:
    key = _shift_key(_options(type(scheduler)))
    return None if key is None else scheduler.config.get(key)


def _is_flow(scheduler: Any) -> bool:
    """Whether a scheduler samples a flow; classes that can do nothing else have no prediction type."""
    return bool(scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction")
