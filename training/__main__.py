"""``python -m training MODEL --work DIR --out DIR``: train an embedded model.

Stages: autoencoder → decoder alone (not where the latents are another model's) → latents of the training scenes →
transformer with text encoder → assembled folder with training card. A model that starts from another one has its
autoencoder and text encoder, and trains the transformer alone. Each stage resumes from its last checkpoint; a finished
one is skipped.
"""

import argparse
import functools
import json
import logging
import platform
import time
from pathlib import Path
from typing import Any

import torch

from s2q.shapes.embedded import embedded_pipeline, embedded_prompts, first_frame, starts_from_image
from s2q.shapes.scenes import combinations
from training.architecture import EmbeddedArchitecture
from training.assemble import (
    assemble,
    finished_vae,
    plot_losses,
    reconstruction_quality,
    taught_vae,
    write_card,
)
from training.cogvideox import ShapesCogVideoX
from training.image_to_video import ImageToVideoTask, ShapesWanImageToVideo
from training.loop import TrainingSettings, train
from training.quality import adherence, first_frame_psnr, sample, write_sheet
from training.transformer import TransformerTask, encode_pool
from training.vae import DecoderTask, TaughtVAETask, VAETask
from training.wan import ShapesWan

logger = logging.getLogger("training")

ARCHITECTURES: dict[str, type[EmbeddedArchitecture]] = {
    cls.name: cls for cls in (ShapesCogVideoX, ShapesWan, ShapesWanImageToVideo)
}
VAE_SETTINGS = TrainingSettings(
    steps=1700, batch_size=16, learning_rate=1.5e-3, warmup_steps=50, ema_decay=0.995, seed=1
)
DECODER_SETTINGS = TrainingSettings(
    steps=500, batch_size=16, learning_rate=7e-4, warmup_steps=20, ema_decay=0.995, seed=2
)
TAUGHT_VAE_SETTINGS = TrainingSettings(
    steps=1500, batch_size=16, learning_rate=1.5e-3, warmup_steps=50, ema_decay=0.995, seed=1, checkpoint_every=100
)
TRANSFORMER_SETTINGS = {
    "shapes-cogvideox": TrainingSettings(steps=8000, batch_size=64, learning_rate=2e-3, muon=True, seed=1),
    "shapes-wan": TrainingSettings(
        steps=2400, batch_size=48, learning_rate=2e-3, muon=True, seed=1, checkpoint_every=100
    ),
    "shapes-wan-i2v": TrainingSettings(
        steps=900,
        batch_size=32,
        learning_rate=6e-4,
        warmup_steps=30,
        muon=True,
        ema_decay=0.995,
        seed=1,
        checkpoint_every=150,
    ),
}
POOL_SIZES = {"shapes-cogvideox": 32_768, "shapes-wan": 32_768, "shapes-wan-i2v": 12_288}
_TOLD = ("steps", "batch_size", "seed")


def main() -> None:
    """Run every stage that is not done yet."""
    parser = argparse.ArgumentParser(description="Train an embedded model.")
    parser.add_argument("model", choices=sorted(ARCHITECTURES), help="which one")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished diffusers pipeline")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes (CPU: one thread each)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--note", default="", help="a sentence for the training card, on what was special in this run")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work, run = arguments.work, {"processes": arguments.processes, "device": arguments.device}
    held_out = combinations(held_out=True)
    model = ARCHITECTURES[arguments.model]()

    teacher, stages = None, dict[str, Path]()
    if model.latents_of is not None:
        teacher = ARCHITECTURES[model.latents_of](), embedded_pipeline(model.latents_of, dtype=torch.float32).vae
    if model.starts_from is not None:
        vae = model.build_vae().eval()
        vae.load_state_dict(embedded_pipeline(model.starts_from, dtype=torch.float32).vae.state_dict())
    else:
        vae, stages = _autoencoder(model, teacher, work, run)
    reconstruction = reconstruction_quality(vae, held_out, seed=4)
    logger.info("reconstruction of held-out scenes: %s", reconstruction)

    pool = work / "pool.safetensors"
    if not pool.exists():
        encoder, encoding = teacher or (model, vae)
        encode_pool(encoder, encoding.to(arguments.device), pool, count=POOL_SIZES[model.name], seed=5)
    vae.to("cpu")
    task_class = TransformerTask if model.starts_from is None else ImageToVideoTask
    task = functools.partial(task_class, model, pool=pool, seed=1)
    train(task, TRANSFORMER_SETTINGS[model.name], work / "transformer", **run)

    pipeline = assemble(model, vae, work / "transformer", arguments.out, seed=1)
    pipeline.to(torch.float32)
    prompts = embedded_prompts(model.name, split="held-out")
    images = [first_frame(model.name, prompt) for prompt in prompts] if starts_from_image(model.name) else None
    started, seeds = time.monotonic(), (0, 1) if images is None else (0,)
    videos = [sample(pipeline, prompts, images=images, seed=seed, **model.generation) for seed in seeds]
    quality = adherence(prompts * len(seeds), torch.cat(videos))
    if images is not None:
        quality["first_frame_psnr_db"] = first_frame_psnr(torch.cat(videos), images * len(seeds))
    logger.info("%d videos in %.0f s: %s", len(seeds) * len(prompts), time.monotonic() - started, quality)
    write_sheet(videos[0][:24], arguments.out / "samples.png")
    stages |= {"transformer": work / "transformer"}
    plot_losses(stages, arguments.out / "losses.png")
    facts = _facts(model, run, stages, reconstruction)
    facts[f"full_precision_adherence_on_held_out_prompts_x_{len(seeds)}_seed{'s' * (len(seeds) > 1)}"] = quality
    write_card(model, arguments.out, facts | ({"note": arguments.note} if arguments.note else {}))


def _autoencoder(
    model: EmbeddedArchitecture, teacher: tuple[EmbeddedArchitecture, Any] | None, work: Path, run: dict[str, Any]
) -> tuple[Any, dict[str, Path]]:
    """The trained autoencoder, and the folders of its stages by name."""
    vae, decoder = work / "vae", work / "decoder"
    if teacher is not None:
        architecture, encoder = teacher
        task = functools.partial(TaughtVAETask, model, teacher=encoder, teacher_architecture=architecture, seed=1)
        train(task, TAUGHT_VAE_SETTINGS, vae, **run)
        return taught_vae(model, vae), {"autoencoder": vae}
    train(functools.partial(VAETask, seed=1), VAE_SETTINGS, vae, **run)
    train(functools.partial(DecoderTask, start=vae), DECODER_SETTINGS, decoder, **run)
    return finished_vae(vae, decoder), {"autoencoder": vae, "decoder": decoder}


def _facts(
    model: EmbeddedArchitecture,
    run: dict[str, Any],
    stages: dict[str, Path],
    reconstruction: dict[str, float],
) -> dict[str, object]:
    processes = run["processes"]
    hardware = f"{processes} CPU core{'s' if processes > 1 else ''} ({platform.machine()})"
    drawn = "scenes drawn afresh for the autoencoder, " if "autoencoder" in stages else ""
    return {
        "data": f"{len(combinations(held_out=False))} combinations of shape, colour, motion and background; "
        f"{len(combinations(held_out=True))} held out; {drawn}{POOL_SIZES[model.name]} scenes for the transformer",
        **{key: {name: _settings(folder)[key] for name, folder in stages.items()} for key in _TOLD},
        "minutes": {name: round(_minutes(folder), 1) for name, folder in stages.items()},
        "hardware": torch.cuda.get_device_name() if run["device"] == "cuda" else hardware,
        "torch": torch.__version__,
        "reconstruction_of_held_out_scenes": reconstruction,
    }


def _settings(folder: Path) -> dict[str, Any]:
    """Training settings of a stage."""
    settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
    return settings


def _minutes(folder: Path) -> float:
    """Wall-clock minutes of a stage over all its resumed runs, from its log."""
    total, previous = 0.0, 0.0
    for line in (folder / "log.jsonl").read_text().splitlines():
        seconds = json.loads(line)["seconds"]
        total += seconds - previous if seconds >= previous else seconds
        previous = seconds
    return total / 60


if __name__ == "__main__":
    main()
