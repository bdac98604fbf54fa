"""Collecting and selecting: the denoising steps of a few prompts, scored, and those that blocks are calibrated on.

For each prompt the full-precision pipeline runs once; kept are the latent before each step and the last one, the
timesteps, and what else the transformer was given (text embedding of both guidance branches, rotary tables): a function
of model, prompt and seed, stored under its fingerprint, so that a killed run does not generate again.

Legend: `R` guidance branches, `f` latent frames, `C` latent channels, `h`, `w` latent height and width.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2q.calibration import (
    SELECTIONS,
    CandidatePool,
    GenerationSettings,
    Trajectory,
    check_prompts,
    record_trajectory,
    resolve_settings,
    score_trajectory,
)
from s2q.core.errors import InvalidInputError
from s2q.core.files import canonical_json
from s2q.core.placement import on_device
from s2q.core.seeds import derive_seed
from s2q.models import family_of
from s2q.models.source import recommended_generation
from s2q.quantization.run_folder import Artefact, RunFolder
from s2q.quantization.teacher import Teacher
from s2q.recipes.schema import CalibrationGroup
from s2q.shapes import embedded

SCHEMA_VERSION = 1
_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class CalibrationInputs:
    """What is collected from, checked against the model.

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
        """Return the name of the artefact of a prompt.

        Args:
            prompt: Its index.
        """
        return f"candidates-{prompt:03d}"

    def prompt_fingerprint(self, prompt: int) -> str:
        """Return the fingerprint of the artefact of a prompt.

        Args:
            prompt: Its index.
        """
        described = [self.fingerprint, self.prompts[prompt], prompt, self.settings.to_dict(), self.seed]
        return hashlib.sha256(canonical_json(described).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class CalibrationCall:
    """One call of the transformer with one sample, to be built when it is needed.

    Attributes:
        prompt: Index of the prompt.
        step: Index of the denoising step.
        branch: Row of the guidance branch; the last, which is -1 too, is the conditional one.
    """

    prompt: int
    step: int
    branch: int

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"prompt {self.prompt}, step {self.step}, branch {self.branch}"


def calibration_prompts(
    model_name: str, prompts: Sequence[str] | None, group: CalibrationGroup, *, recipe: str
) -> list[str]:
    """Return the prompts to calibrate on.

    Args:
        model_name: Name of the model; the embedded ones have prompts of their own.
        prompts: What was given, if anything; the first `n_prompts` are taken.
        group: The recipe's part.
        recipe: Name of the recipe, for messages.

    Raises:
        InvalidInputError: If there are none.
    """
    if prompts is None:
        if model_name in embedded.EMBEDDED_NAMES:
            return embedded.embedded_prompts(model_name, split="calibration", count=group.n_prompts)
        raise InvalidInputError(
            f"recipe {recipe} calibrates on prompts and none were given; pass --prompts FILE with about "
            f"{group.n_prompts} of them (prompts=[...] in Python)"
        )
    if isinstance(prompts, str):
        raise InvalidInputError("prompts: got one string; pass a list of prompts")
    if not prompts:
        raise InvalidInputError(f"recipe {recipe} calibrates on prompts and the list is empty; pass at least one")
    return list(prompts[: group.n_prompts])


def prepare(
    teacher: Teacher, prompts: Sequence[str], group: CalibrationGroup, *, seed: int, inputs: Mapping[str, Any]
) -> CalibrationInputs:
    """Check prompts and numbers against the model, before anything is generated.

    Args:
        teacher: The model.
        prompts: See `calibration_prompts`.
        group: The recipe's part.
        seed: Seed of the run.
        inputs: What else decides the result: device, versions. Plain data.

    Raises:
        InvalidInputError: If the pipeline needs more than prompts, a prompt is too long or empty, or more samples are
            asked for than there are candidates.
    """
    expected, found = family_of(teacher.transformer).pipeline_class, type(teacher.pipe).__name__
    if found != expected:
        raise InvalidInputError(
            f"{found}: calibration generates from prompts alone, with {expected}; take a recipe that does not "
            f"calibrate, or save the transformer in a {expected}"
        )
    check_prompts(teacher.pipe, prompts)
    requested = group.model_dump(include={"num_frames", "height", "width"}) | {"num_inference_steps": group.steps}
    settings = resolve_settings(teacher.pipe, requested=requested, defaults=recommended_generation(teacher.folder))
    candidates = len(prompts) * settings.num_inference_steps
    if group.samples > candidates:
        raise InvalidInputError(
            f"calibration.samples={group.samples}, but {len(prompts)} prompts with {settings.num_inference_steps} "
            f"steps are only {candidates} candidates; ask for fewer samples, or give more prompts"
        )
    digest = hashlib.sha256(canonical_json({"version": _VERSION, **inputs}).encode())
    for part in _parts(teacher.pipe, "scheduler", "guider"):
        digest.update(canonical_json(_plain(dict(part.config))).encode())
    for part in _parts(teacher.pipe, "text_encoder", "text_encoder_2", "transformer"):
        _hash_module(digest, part)
        teacher.set_aside(part)
    return CalibrationInputs(prompts=tuple(prompts), settings=settings, fingerprint=digest.hexdigest(), seed=seed)


def collect(
    teacher: Teacher,
    inputs: CalibrationInputs,
    folder: RunFolder,
    *,
    device: str,
    progress: Callable[[int, int], None],
) -> CandidatePool:
    """Generate what is not there yet and score every step.

    Args:
        teacher: The model.
        inputs: See `prepare`.
        folder: Where the candidates are kept.
        device: Where to generate.
        progress: Called with the steps done and those in all.

    Returns:
        The pool.

    Raises:
        S2QError: If the model generates NaN.
    """
    steps = inputs.settings.num_inference_steps
    total, done = steps * len(inputs.prompts), 0
    channel_dim = family_of(teacher.transformer).latent_channel_dim
    candidates = []
    progress(0, total)
    for index, prompt in enumerate(inputs.prompts):
        key, fingerprint = inputs.key(index), inputs.prompt_fingerprint(index)
        if not folder.has(key, fingerprint):
            counter = _Counter(done, total, progress)
            with on_device(teacher.modules, device, set_aside=teacher.mapped):
                trajectory = record_trajectory(
                    teacher.pipe,
                    [prompt],
                    seeds=[derive_seed(inputs.seed, "prompt", index)],
                    settings=inputs.settings,
                    step_done=counter,
                )
            folder.save(key, fingerprint, _to_artefact(trajectory, channel_dim=channel_dim))
        artefact = folder.load(key)
        latents = list(artefact.tensors["latents"].unbind(0))
        timesteps = artefact.tensors["timesteps"].tolist()
        candidates += score_trajectory(latents, timesteps, prompt=index, channel_dim=channel_dim)
        done += steps
        progress(done, total)
    for part in teacher.parts:
        teacher.set_aside(part)
    return CandidatePool(candidates=tuple(candidates))


def select(
    pool: CandidatePool, inputs: CalibrationInputs, group: CalibrationGroup, *, branches: int
) -> tuple[list[CalibrationCall], dict[str, Any]]:
    """Take samples from the pool.

    Args:
        pool: The candidates.
        inputs: What they were collected from.
        group: The recipe's part.
        branches: Guidance branches of a call.

    Returns:
        The calls, and the record for selection.json: every candidate with its scores and whether it was taken.
    """
    chosen = SELECTIONS[group.selection](pool, group.samples, derive_seed(inputs.seed, "selection"))
    calls = []
    for position, index in enumerate(chosen):
        one = pool.candidates[index]
        rows = {
            "alternate": [(branches - 1 - position) % branches],
            "conditional": [branches - 1],
            "both": list(range(branches)),
        }[group.branches]
        calls += [CalibrationCall(prompt=one.prompt, step=one.step, branch=row) for row in rows]
    taken = set(chosen)
    scores = zip(pool.diffusion_salience, pool.quantization_salience, pool.salience, strict=True)
    record = {
        "schema_version": SCHEMA_VERSION,
        "selection": group.selection,
        "branches": group.branches,
        "prompts": list(inputs.prompts),
        "seed": inputs.seed,
        "settings": inputs.settings.to_dict(),
        "samples": len(chosen),
        "candidates": [
            {
                "prompt": one.prompt,
                "step": one.step,
                "timestep": one.timestep,
                "diffusion": one.diffusion,
                "quantization": one.quantization,
                "diffusion_salience": diffusion,
                "quantization_salience": quantization,
                "salience": salience,
                "selected": index in taken,
            }
            for index, (one, (diffusion, quantization, salience)) in enumerate(
                zip(pool.candidates, scores, strict=True)
            )
        ],
    }
    return calls, record


def every_timestep(inputs: CalibrationInputs) -> list[CalibrationCall]:
    """Return one conditional call for each timestep of the generation, of one prompt after another.

    Args:
        inputs: What the candidates were collected from.
    """
    steps, prompts = inputs.settings.num_inference_steps, len(inputs.prompts)
    return [CalibrationCall(prompt=step % prompts, step=step, branch=-1) for step in range(steps)]


def call_inputs(artefact: Artefact, call: CalibrationCall) -> dict[str, Any]:
    """Build the keyword arguments of a transformer call with one sample.

    Args:
        artefact: The candidates of the call's prompt.
        call: Which step and branch.

    Returns:
        The arguments, on the CPU.
    """
    branches = int(artefact.stats["branches"])
    inputs: dict[str, Any] = {"hidden_states": artefact.tensors["inputs"][call.step][None]}
    for name, kind in artefact.stats["arguments"].items():
        if kind == "rows":
            inputs[name] = artefact.tensors[f"arguments.{name}"][call.branch % branches][None]
        elif kind == "step rows":
            inputs[name] = artefact.tensors[f"arguments.{name}"][call.step][call.branch % branches][None]
        elif kind == "shared":
            inputs[name] = artefact.tensors[f"arguments.{name}"]
        elif kind == "plain":
            inputs[name] = artefact.stats["plain"][name]
        else:
            inputs[name] = tuple(artefact.tensors[f"arguments.{name}.{part}"] for part in range(kind))
    return inputs


def branches_of(folder: RunFolder, inputs: CalibrationInputs) -> int:
    """Return how many guidance branches the collected calls have.

    Args:
        folder: Where the candidates are kept.
        inputs: What they were collected from.
    """
    return int(folder.stats(inputs.key(0))["branches"])


def selection_plot(record: Mapping[str, Any]) -> bytes:
    """Draw the three scores over prompts × timesteps, the chosen candidates marked.

    Args:
        record: See `select`.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(record["prompts"])
    columns = 1 + max(one["step"] for one in record["candidates"])
    figure = Figure(figsize=(min(16.0, 3 + 0.2 * columns), 1.5 + 3 * (0.6 + 0.16 * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {
        "diffusion_salience": "diffusion salience",
        "quantization_salience": "quantization salience",
        "salience": "their product",
    }
    axes = figure.subplots(len(titles), 1, squeeze=False, sharex=True)[:, 0]
    chosen = [(one["step"], one["prompt"]) for one in record["candidates"] if one["selected"]]
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        grid = torch.full((rows, columns), float("nan"))
        for one in record["candidates"]:
            grid[one["prompt"], one["step"]] = one[key]
        image = axis.imshow(grid.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axis.scatter(*zip(*chosen, strict=True), s=14, facecolors="none", edgecolors="red", linewidths=1)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylabel("prompt", fontsize=8)
        figure.colorbar(image, ax=axis)
    axes[-1].set_xlabel("denoising step, from noise to video (red: taken)", fontsize=8)
    figure.suptitle(f"selection {record['selection']}: {record['samples']} samples", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


class _Counter:
    def __init__(self, done: int, total: int, progress: Callable[[int, int], None]) -> None:
        self.done, self.total, self.progress = done, total, progress

    def __call__(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)


def _to_artefact(trajectory: Trajectory, *, channel_dim: int) -> Artefact:
    calls = trajectory.calls
    branches = trajectory.branches(calls[0])
    inputs = torch.stack([call.inputs["hidden_states"][-1] for call in calls])
    latents = inputs.narrow(1 + channel_dim, 0, trajectory.latents.shape[1 + channel_dim])
    tensors = {
        "inputs": inputs,
        "latents": torch.cat([latents.float(), trajectory.latents]),
        "timesteps": torch.tensor([call.timestep for call in calls], dtype=torch.float64),
    }
    arguments: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name, value in calls[0].inputs.items():
        if name == "hidden_states":
            continue
        if isinstance(value, tuple) and isinstance(value[0], Tensor):
            arguments[name] = len(value)
            tensors |= {f"arguments.{name}.{part}": one.clone() for part, one in enumerate(value)}
        elif isinstance(value, Tensor):
            kind, stored = _stored(name, [call.inputs[name] for call in calls], branches)
            arguments[name], tensors[f"arguments.{name}"] = kind, stored
        else:
            arguments[name], plain[name] = "plain", value
    return Artefact(tensors=tensors, stats={"branches": branches, "arguments": arguments, "plain": plain})


def _stored(name: str, values: Sequence[Tensor], branches: int) -> tuple[str, Tensor]:
    """How an argument is kept: once, once a branch, or once a step and branch."""
    first = values[0]
    fixed = all(one is first or torch.equal(one, first) for one in values)
    if first.ndim and first.shape[0] == branches:
        return ("rows", first.clone()) if fixed else ("step rows", torch.stack(list(values)))
    if not fixed:
        raise InvalidInputError(f"calibration: argument {name} changes from step to step and has no row for a sample")
    return "shared", first.clone()


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
