"""Collecting: the denoising steps of a few prompts, scored.

For each prompt the full-precision pipeline runs once, up to the last step that a selection without scores takes of it,
or to the end. Kept are the latent before each step and the last one, the timesteps, which transformer was called, and
what else it was given (text embedding of both guidance branches, rotary tables): a function of model, prompt and seed,
stored under its fingerprint, so that a killed run does not generate again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from s2q.calibration.artefacts import to_artefact
from s2q.calibration.teacher import Teacher
from s2q.common.components import full_name, transformers_of
from s2q.common.errors import InvalidInputError
from s2q.common.fingerprint import fingerprint
from s2q.common.progress import Tick
from s2q.common.run_folder import ArtefactFolder
from s2q.common.seeds import derive_seed
from s2q.generation.conditioning import check_supported, image_to_video
from s2q.generation.defaults import with_first_frames
from s2q.generation.prompts import Prompt, prompt_record
from s2q.generation.settings import GenerationSettings, check_prompts
from s2q.generation.sharing import steps_of_transformers
from s2q.generation.trajectory import record_trajectory
from s2q.models.source import recommended_generation
from s2q.planning.workload import calibration_settings
from s2q.selection.known import known_samples, recorded_by_round
from s2q.selection.options import Calibration
from s2q.selection.scores import Candidate, CandidatePool, score_trajectory
from s2q.shapes import embedded

_VERSION = 6


@dataclass(frozen=True, kw_only=True)
class CalibrationInputs:
    """Inputs of the collection of candidates, checked against the model.

    Attributes:
        fingerprint: Of model, seed and versions.
        steps: Denoising steps to record of each prompt; 0 for a prompt that is not generated.
        components: The transformers whose calls are candidates.
        chosen: Prompt and step of each sample, by component; None where the selection needs scores.
        prefix: Of the names of artefacts.
    """

    prompts: tuple[str, ...]
    settings: GenerationSettings
    fingerprint: str
    seed: int
    steps: tuple[int, ...]
    components: tuple[str, ...]
    chosen: Mapping[str, frozenset[tuple[int, int]]] | None = None
    prefix: str = "candidates"

    @property
    def recorded(self) -> list[int]:
        """The indices of the prompts that are generated."""
        return [prompt for prompt, steps in enumerate(self.steps) if steps]

    def key(self, prompt: int) -> str:
        """Return the name of the artefact of a prompt."""
        return f"{self.prefix}-{prompt:03d}"

    def prompt_fingerprint(self, prompt: int) -> str:
        """Return the fingerprint of the artefact of a prompt."""
        described, settings = prompt_record(self.prompts[prompt]), self.settings.to_dict()
        return fingerprint([self.fingerprint, described, prompt, settings, self.seed, self.steps[prompt]])


def calibration_prompts(
    model_name: str, prompts: Sequence[str] | None, group: Calibration, *, recipe: str
) -> list[Prompt]:
    """Return the prompts to calibrate on: the first `n_prompts` of those given, or the embedded model's own."""
    if prompts is None:
        if model_name in embedded.EMBEDDED_NAMES:
            captions = embedded.embedded_prompts(model_name, split="calibration", count=group.n_prompts)
            return with_first_frames(model_name, captions)
        raise InvalidInputError(
            f"recipe {recipe} needs calibration prompts; pass --prompts FILE with about "
            f"{group.n_prompts} of them (prompts=[...] in Python)"
        )
    if not prompts:
        raise InvalidInputError(f"recipe {recipe} needs calibration prompts, but the list is empty; pass at least one")
    return with_first_frames(model_name, prompts[: group.n_prompts])


def prepare(
    teacher: Teacher,
    prompts: Sequence[str],
    group: Calibration,
    *,
    seed: int,
    inputs: Mapping[str, Any],
    component: str | None = None,
) -> CalibrationInputs:
    """Check prompts and numbers against the model, before anything is generated.

    Args:
        component: The first transformer, where each has trajectories of its own (`prepare_next`); None is all together.
    """
    check_supported(teacher.pipe)
    settings = calibration_settings(teacher.pipe, group, recommended=recommended_generation(teacher.folder))
    check_prompts(teacher.pipe, prompts, settings)
    _check_candidates(teacher, group, settings, prompts=len(prompts))
    config = {key: value for key, value in teacher.pipe.config.items() if not key.startswith("_")}
    described = {
        "version": _VERSION,
        "switches": {key: value for key, value in config.items() if key not in teacher.pipe.components},
        "configs": [dict(part.config) for part in _parts(teacher.pipe, "scheduler", "guider")],
        **inputs,
    }
    digest = fingerprint(json.loads(json.dumps(described, default=str)), _parts_to_hash(teacher))
    inputs_of_all = CalibrationInputs(
        prompts=tuple(prompts),
        settings=settings,
        fingerprint=digest,
        seed=seed,
        steps=(),
        components=tuple(transformer.component for transformer in teacher.transformers),
    )
    return _of_round(inputs_of_all, teacher, group, component=component)


def prepare_next(
    before: CalibrationInputs, teacher: Teacher, group: Calibration, *, component: str, quantized: Mapping[str, Any]
) -> CalibrationInputs:
    """Return the inputs of a further transformer, which is called after those before it are quantized.

    The fingerprint follows from that of the round before and what describes the quantized transformers: the weights are
    not hashed again.
    """
    following = replace(before, fingerprint=fingerprint([before.fingerprint, quantized]))
    return _of_round(following, teacher, group, component=component)


def _of_round(
    inputs: CalibrationInputs, teacher: Teacher, group: Calibration, *, component: str | None
) -> CalibrationInputs:
    """Complete inputs by what one transformer, or all together (None), is recorded for."""
    count = len(inputs.prompts)
    chosen = chosen_steps(teacher, group, inputs.settings, prompts=count, seed=inputs.seed)
    called = steps_of_transformers(teacher.pipe, inputs.settings)
    steps = recorded_by_round(chosen, called, prompts=count, apart=component is not None)[component]
    if component is None:
        return replace(inputs, steps=steps, chosen=chosen)
    return replace(
        inputs,
        steps=steps,
        components=(component,),
        chosen=None if chosen is None else {component: chosen[component]},
        prefix=full_name(component, CalibrationInputs.prefix),
    )


def chosen_steps(
    teacher: Teacher, group: Calibration, settings: GenerationSettings, *, prompts: int, seed: int
) -> dict[str, frozenset[tuple[int, int]]] | None:
    """Return prompt and step of each sample of the quantized transformers; see `known_samples`."""
    known = known_samples(group, steps_of_transformers(teacher.pipe, settings), prompts=prompts, seed=seed)
    if known is None:
        return None
    return {transformer.component: known[transformer.component] for transformer in teacher.transformers}


def missing_prompts(inputs: CalibrationInputs, folder: ArtefactFolder) -> list[int]:
    """Return the indices of the prompts whose calls are not in the folder yet."""
    return [index for index in inputs.recorded if not folder.has(inputs.key(index), inputs.prompt_fingerprint(index))]


def record_prompt(
    teacher: Teacher, inputs: CalibrationInputs, folder: ArtefactFolder, prompt: int, *, step_done: Tick
) -> None:
    """Generate from a prompt, by its index, on the device where the teacher's modules are; store the calls."""
    trajectory = record_trajectory(
        teacher.pipe,
        [inputs.prompts[prompt]],
        seeds=[derive_seed(inputs.seed, "prompt", prompt)],
        settings=inputs.settings,
        steps=inputs.steps[prompt],
        step_done=step_done,
    )
    family = teacher.family
    artefact = to_artefact(trajectory, channel_dim=family.latent_channel_dim, unbatched=family.unbatched)
    folder.save(inputs.key(prompt), inputs.prompt_fingerprint(prompt), artefact)


def score_candidates(teacher: Teacher, inputs: CalibrationInputs, folder: ArtefactFolder) -> dict[str, CandidatePool]:
    """Return the scored steps of each quantized transformer, by component, once the prompts are recorded."""
    channel_dim = teacher.family.latent_channel_dim
    by_component: dict[str, list[Candidate]] = {component: [] for component in inputs.components}
    for index in inputs.recorded:
        artefact = folder.load(inputs.key(index))
        latents = list(artefact.tensors["latents"].unbind(0))
        timesteps = artefact.tensors["timesteps"].tolist()
        scored = score_trajectory(latents, timesteps, prompt=index, channel_dim=channel_dim)
        for component, candidates in by_component.items():
            called = zip(scored, artefact.stats["transformers"], strict=True)
            candidates += [candidate for candidate, transformer in called if transformer == component]
    return {component: CandidatePool(candidates=tuple(candidates)) for component, candidates in by_component.items()}


def branches_of(folder: ArtefactFolder, inputs: CalibrationInputs) -> int:
    """Return how many guidance branches the collected calls have."""
    return int(folder.stats(inputs.key(inputs.recorded[0]))["branches"])


def _check_candidates(teacher: Teacher, group: Calibration, settings: GenerationSettings, *, prompts: int) -> None:
    """Refuse a number of samples that a transformer does not have candidates for."""
    shared, steps = steps_of_transformers(teacher.pipe, settings), settings.num_inference_steps
    for transformer in teacher.transformers:
        called = shared[transformer.component]
        if not called:
            skipped = full_name(transformer.component, transformer.family.block_lists[0])
            raise InvalidInputError(
                f"calibration: {transformer.component} is not called in any of the {steps} steps (boundary_ratio="
                f"{teacher.pipe.config.boundary_ratio}); exclude it with skip=['{skipped}.*'], use more steps, or a "
                "recipe without calibration"
            )
        if group.samples > prompts * called:
            of = f" of {transformer.component}" if len(shared) > 1 else ""
            raise InvalidInputError(
                f"calibration.samples={group.samples}, but {prompts} prompts with {called} steps{of} give only "
                f"{prompts * called} candidates; use fewer samples or more prompts"
            )


def _parts(pipe: Any, *names: str) -> list[Any]:
    """Those components of a pipeline that it has."""
    return [part for part in (getattr(pipe, name, None) for name in names) if part is not None]


def _parts_to_hash(teacher: Teacher) -> Iterator[nn.Module]:
    """The parts whose weights decide what is generated; each is paged out after its turn."""
    of_images = () if image_to_video(teacher.pipe) is None else ("image_encoder", "vae")
    encoders = _parts(teacher.pipe, "text_encoder", "text_encoder_2", "connectors", *of_images)
    for part in (*encoders, *transformers_of(teacher.pipe).values()):
        yield part
        teacher.page_out(part)
