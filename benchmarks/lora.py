"""A trained adapter on quantized models: fused before quantization against attached after it, on ``shapes-wan``.

    PYTHONPATH=. python benchmarks/lora.py [-r RECIPE ...] [--prompts 16] [--work DIR]

``training.lora`` trains the adapter: it gives each colour name another colour. Full precision with the adapter is the
reference of all rows. Beside the fidelity of videos, two figures say what is left of the adapter's effect on the
velocity, d = v(with) − v(without), on the trajectory of the reference: the ratio ⟨d_q, d⟩ / ⟨d, d⟩, 1 for the whole
effect, and the error ‖d_q − d‖² / ‖d‖². Into ``benchmarks/results/lora.json``; ``--work`` keeps adapter and checkpoints
as well. A recipe that is in the results is skipped, if they are of this adapter and as many prompts.
"""

import argparse
import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from environment import environment
from records import rounded, write_record
from torch import Tensor, nn

import s2q
from s2q.evaluation.intervals import clustered_mean
from s2q.evaluation.metrics import psnr_frame_mean_db
from s2q.generation.defaults import generation_defaults
from s2q.generation.denoise import denoise
from s2q.generation.settings import GenerationSettings, resolve_settings
from s2q.generation.trajectory import Trajectory, record_trajectory
from s2q.models import resolve_model
from s2q.models.lora import with_loras
from s2q.shapes.detector import detect
from s2q.shapes.embedded import embedded_prompts
from s2q.shapes.scenes import parse_caption
from training.lora import LORA, MODEL, PAINTED, SETTINGS, train_lora, training_minutes

RESULT = Path(__file__).parent / "results" / "lora.json"
SHARES = ("new_colour", "old_colour", "rest")
RECIPES = ("rtn-w4a6", "s2q-w4a6", "s2q-plus-w4a6")
logger = logging.getLogger("lora")


@torch.no_grad()
def answers(transformer: nn.Module, trajectory: Trajectory) -> Tensor:
    """Answer the calls of a trajectory: velocities by video ``[B, S, branches, C, f, h, w]``, float64."""
    return by_video([transformer(**call.inputs, return_dict=False)[0] for call in trajectory.calls], trajectory)


def by_video(outputs: list[Tensor], trajectory: Trajectory) -> Tensor:
    """Order the outputs of calls by video: ``[B, S, branches, C, f, h, w]``, float64."""
    calls = list(zip(outputs, trajectory.calls, strict=True))
    videos = range(len(trajectory.prompts))
    return torch.stack(
        [torch.stack([output[trajectory.rows_of(call, video)] for output, call in calls]) for video in videos]
    ).double()


def effects(change: Tensor, expected: Tensor) -> list[dict[str, float]]:
    """Compare an adapter's effect with that in full precision, both as of `by_video`, video by video."""
    dims = tuple(range(1, change.ndim))
    base = expected.square().sum(dims)
    ratio, error = (change * expected).sum(dims) / base, (change - expected).square().sum(dims) / base
    return [{"effect_ratio": float(a), "effect_error": float(b)} for a, b in zip(ratio, error, strict=True)]


def palette_scores(prompt: str, frames: Tensor) -> dict[str, float]:
    """Whether the object has the colour that the adapter gives to its word, that of the word, and the rest is right."""
    wanted, shown = parse_caption(prompt), detect(frames)
    assert wanted is not None
    return {
        "new_colour": float(shown.colour == PAINTED[str(wanted.colour)]),
        "old_colour": float(shown.colour == wanted.colour),
        "rest": float(replace(shown, colour=wanted.colour) == wanted),
    }


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Full precision with the adapter: its trajectory, its velocity and the adapter's effect on that, `by_video`."""

    settings: GenerationSettings
    trajectory: Trajectory
    velocity: Tensor
    effect: Tensor

    def judge(self, pipe: Any, velocity: Tensor) -> list[dict[str, Any]]:
        """Judge a model by its videos and its velocity on the trajectory, video by video."""
        prompts, frames = self.trajectory.prompts, self.trajectory.frames
        result = denoise(pipe, list(prompts), seeds=[0] * len(prompts), settings=self.settings)
        dims = tuple(range(2, velocity.ndim))
        steps = (velocity - self.velocity).square().sum(dims) / self.velocity.square().sum(dims)
        return [
            {
                "prompt": prompt,
                "velocity_relative_error": float(steps[video].mean()),
                "psnr_frame_mean_db": psnr_frame_mean_db(result.frames[video], frames[video]),
                **palette_scores(prompt, result.frames[video]),
            }
            for video, prompt in enumerate(prompts)
        ]


def reference_of(adapter: Path, plain: Any, prompts: int) -> Reference:
    """Generate with the adapter in full precision; ``plain`` is the pipeline without it."""
    source = with_loras(resolve_model(MODEL), [str(adapter)])
    pipe = source.load_pipeline(dtype=torch.float32)
    settings = resolve_settings(pipe, defaults=generation_defaults(MODEL))
    captions = embedded_prompts(MODEL, split="held-out", count=prompts)
    trajectory = record_trajectory(pipe, captions, seeds=[0] * prompts, settings=settings, decode=True)
    velocity = by_video([call.output for call in trajectory.calls], trajectory)
    effect = velocity - answers(plain.transformer, trajectory)
    return Reference(settings=settings, trajectory=trajectory, velocity=velocity, effect=effect)


def summarised(videos: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with intervals over prompts, and the videos."""
    names = [name for name in videos[0] if name != "prompt"]
    means = {
        name: vars(clustered_mean({video["prompt"]: [video[name]] for video in videos}, proportion=name in SHARES))
        for name in names
    }
    rows = [{name: value if name == "prompt" else rounded(value) for name, value in video.items()} for video in videos]
    return means | {"videos": rows}


def measure(recipe: str, adapter: Path, reference: Reference, work: Path) -> dict[str, Any]:
    """Quantize with the adapter and without, and judge both ways of using it."""
    plain, fused = work / f"{MODEL}-{recipe}", work / f"{MODEL}-{recipe}-adapter"
    for out, loras in ((plain, []), (fused, [adapter])):
        if not out.exists():
            s2q.quantize(MODEL, recipe=recipe, out=out, loras=loras)
    pipe = s2q.load(plain, dtype="float32")
    without = answers(pipe.transformer, reference.trajectory)
    pipe.load_lora_weights(str(adapter))
    results = {}
    for name, model in (("fused", s2q.load(fused, dtype="float32")), ("attached", pipe)):
        velocity = answers(model.transformer, reference.trajectory)
        changes = effects(velocity - without, reference.effect)
        videos = zip(reference.judge(model, velocity), changes, strict=True)
        results[name] = summarised([video | change for video, change in videos])
    return results


def main() -> None:
    """Train the adapter if it is not there, and measure the recipes that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-r", "--recipe", action="append")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--work", type=Path, help="folder to keep the adapter and the checkpoints in")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        adapter = work / "adapter" / "pytorch_lora_weights.safetensors"
        if not adapter.exists():
            train_lora(work / "training", adapter.parent)
        plain = s2q.load(MODEL, dtype="float32")
        reference = reference_of(adapter, plain, arguments.prompts)
        pairs = list(zip(reference.trajectory.prompts, reference.trajectory.frames, strict=True))
        record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        adapted = {"prompts": arguments.prompts, "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest()}
        if any(record.get(name) != value for name, value in adapted.items()):  # rows of one table have one reference
            record = adapted | {"recipes": {}}
        record |= {
            "model": MODEL,
            "training": {
                "steps": SETTINGS.steps,
                "batch_size": SETTINGS.batch_size,
                "rank": LORA.r,
                "minutes": round(training_minutes(work / "training"), 1),
            },
            "with adapter": summarised(
                [{"prompt": prompt, **palette_scores(prompt, video)} for prompt, video in pairs]
            ),
            "without adapter": summarised(reference.judge(plain, reference.velocity - reference.effect)),
            **environment(),
        }
        logger.info("colours of the adapter: %.3f of videos", record["with adapter"]["new_colour"]["mean"])
        for recipe in arguments.recipe or RECIPES:
            if recipe not in record["recipes"]:
                record["recipes"][recipe] = measure(recipe, adapter, reference, work)
                write_record(RESULT, record)
                for name, result in record["recipes"][recipe].items():
                    means = ", ".join(f"{key} {value['mean']:.4g}" for key, value in result.items() if key != "videos")
                    logger.info("%s %s: %s", recipe, name, means)


if __name__ == "__main__":
    main()
