"""Collecting: the denoising steps of a few prompts, scored.

For each prompt the full-precision pipeline runs once; kept are the latent before each step and the last one, the
timesteps, which transformer was called, and what else it was given (text embedding of both guidance branches, rotary
tables): a function of model, prompt and seed, stored under its fingerprint, so that a killed run does not generate
again.

Legend: `R` guidance branches, `f` latent frames, `C` latent channels, `h`, `w` latent height and width.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from s2q.calibration.artefacts import to_artefact
from s2q.calibration.teacher import Teacher
from s2q.common.components import full_name, transformers_of
from s2q.common.errors import InvalidInputError
from s2q.common.files import canonical_json
from s2q.common.memory import on_device
from s2q.common.progress import Progress, StageCounter
from s2q.common.run_folder import RunFolder
from s2q.common.seeds import derive_seed
from s2q.generation.settings import GenerationSettings, check_prompts, resolve_settings, takes_prompts_alone
from s2q.generation.sharing import steps_of_transformers
from s2q.generation.trajectory import record_trajectory
from s2q.models.source import recommended_generation
from s2q.selection.options import Calibration
from s2q.selection.scores import Candidate, CandidatePool, score_trajectory
from s2q.shapes import embedded

_VERSION = 4


@dataclass(frozen=True, kw_only=True)
class CalibrationInputs:
    """Inputs of the collection of candidates, checked against the model.

    Attributes:
        prompts: The prompts that are used.
        settings: How they are generated.
        fingerprint: Hash of everything else that the result depends on: model, seed, versions.
        seed: Seed of the run.
    """

    prompts: tuple[str, ...]
    settings: GenerationSettings
    fingerprint: str
    seed: int

    def key(self, prompt: int) -> str:
        """Return the name of the artefact of a prompt, by its index."""
        return f"candidates-{prompt:03d}"

    def prompt_fingerprint(self, prompt: int) -> str:
        """Return the fingerprint of the artefact of a prompt, by its index."""
        described = [self.fingerprint, self.prompts[prompt], prompt, self.settings.to_dict(), self.seed]
        return hashlib.sha256(canonical_json(described).encode()).hexdigest()


def calibration_prompts(
    model_name: str, prompts: Sequence[str] | None, group: Calibration, *, recipe: str
) -> list[str]:
    """Return the prompts to calibrate on: the first `n_prompts` of those given, or the embedded model's own."""
    if prompts is None:
        if model_name in embedded.EMBEDDED_NAMES:
            return embedded.embedded_prompts(model_name, split="calibration", count=group.n_prompts)
        raise InvalidInputError(
            f"recipe {recipe} needs calibration prompts; pass --prompts FILE with about "
            f"{group.n_prompts} of them (prompts=[...] in Python)"
        )
    if not prompts:
        raise InvalidInputError(f"recipe {recipe} needs calibration prompts, but the list is empty; pass at least one")
    return list(prompts[: group.n_prompts])


def prepare(
    teacher: Teacher, prompts: Sequence[str], group: Calibration, *, seed: int, inputs: Mapping[str, Any]
) -> CalibrationInputs:
    """Check prompts and numbers against the model, before anything is generated."""
    if not takes_prompts_alone(teacher.pipe):
        expected, found = teacher.family.pipeline_class, type(teacher.pipe).__name__
        raise InvalidInputError(
            f"{found}: calibration generates from prompts only, with {expected}; use a recipe without calibration, or "
            f"save the transformer in a {expected}"
        )
    check_prompts(teacher.pipe, prompts)
    requested = group.sizes | {"num_inference_steps": group.steps}
    settings = resolve_settings(teacher.pipe, requested=requested, defaults=recommended_generation(teacher.folder))
    _check_candidates(teacher, group, prompts=len(prompts), steps=settings.num_inference_steps)
    digest = hashlib.sha256(canonical_json({"version": _VERSION, **inputs}).encode())
    own = {key: value for key, value in teacher.pipe.config.items() if not key.startswith("_")}
    switches = {key: value for key, value in own.items() if key not in teacher.pipe.components}
    digest.update(canonical_json(_plain(switches)).encode())
    for part in _parts(teacher.pipe, "scheduler", "guider"):
        digest.update(canonical_json(_plain(dict(part.config))).encode())
    for part in (*_parts(teacher.pipe, "text_encoder", "text_encoder_2"), *transformers_of(teacher.pipe).values()):
        _hash_module(digest, part)
        teacher.page_out(part)
    return CalibrationInputs(prompts=tuple(prompts), settings=settings, fingerprint=digest.hexdigest(), seed=seed)


def collect(
    teacher: Teacher, inputs: CalibrationInputs, folder: RunFolder, *, device: str, progress: Progress
) -> dict[str, CandidatePool]:
    """Generate what is not there yet and score every step.

    Returns:
        For each transformer that is quantized, by component, the steps in which it was called.
    """
    _generate(teacher, inputs, folder, device=device, progress=progress)
    channel_dim = teacher.family.latent_channel_dim
    found: dict[str, list[Candidate]] = {one.component: [] for one in teacher.transformers}
    for index in range(len(inputs.prompts)):
        artefact = folder.load(inputs.key(index))
        latents = list(artefact.tensors["latents"].unbind(0))
        timesteps = artefact.tensors["timesteps"].tolist()
        scored = score_trajectory(latents, timesteps, prompt=index, channel_dim=channel_dim)
        for component, candidates in found.items():
            called = zip(scored, artefact.stats["transformers"], strict=True)
            candidates += [candidate for candidate, transformer in called if transformer == component]
    for part in teacher.parts:
        teacher.page_out(part)
    return {component: CandidatePool(candidates=tuple(candidates)) for component, candidates in found.items()}


def branches_of(folder: RunFolder, inputs: CalibrationInputs) -> int:
    """Return how many guidance branches the collected calls have."""
    return int(folder.stats(inputs.key(0))["branches"])


def _generate(
    teacher: Teacher, inputs: CalibrationInputs, folder: RunFolder, *, device: str, progress: Progress
) -> None:
    """Record and store the prompts that are not there yet, all in one stay of the pipeline on the device."""
    count, steps = len(inputs.prompts), inputs.settings.num_inference_steps
    missing = [index for index in range(count) if not folder.has(inputs.key(index), inputs.prompt_fingerprint(index))]
    step_done = StageCounter(progress, "collect", count * steps, done=(count - len(missing)) * steps)
    with on_device(teacher.modules if missing else (), device, offload=teacher.mapped):
        for index in missing:
            trajectory = record_trajectory(
                teacher.pipe,
                [inputs.prompts[index]],
                seeds=[derive_seed(inputs.seed, "prompt", index)],
                settings=inputs.settings,
                step_done=step_done,
            )
            artefact = to_artefact(trajectory, channel_dim=teacher.family.latent_channel_dim)
            folder.save(inputs.key(index), inputs.prompt_fingerprint(index), artefact)


def _check_candidates(teacher: Teacher, group: Calibration, *, prompts: int, steps: int) -> None:
    """Refuse a number of samples that a transformer does not have candidates for."""
    shared = steps_of_transformers(teacher.pipe, steps)
    for one in teacher.transformers:
        own = shared[one.component]
        if not own:
            skipped = full_name(one.component, one.family.block_lists[0])
            raise InvalidInputError(
                f"calibration: {one.component} is not called in any of the {steps} steps (boundary_ratio="
                f"{teacher.pipe.config.boundary_ratio}); exclude it with skip=['{skipped}.*'], use more steps, or a "
                "recipe without calibration"
            )
        if group.samples > prompts * own:
            of = f" of {one.component}" if len(shared) > 1 else ""
            raise InvalidInputError(
                f"calibration.samples={group.samples}, but {prompts} prompts with {own} steps{of} give only "
                f"{prompts * own} candidates; use fewer samples or more prompts"
            )


def _parts(pipe: Any, *names: str) -> list[Any]:
    """Those components of a pipeline that it has."""
    return [part for part in (getattr(pipe, name, None) for name in names) if part is not None]


def _hash_module(digest: Any, module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
