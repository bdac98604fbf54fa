"""``python -m training.lora --work DIR --out DIR``: a LoRA that teaches ``shapes-wan`` another palette.

Each colour name gets another colour of the palette (`PAINTED`); shapes, motions and backgrounds keep their names. The
adapter changes what a word means and nothing else, so its effect is the named colour of an object, which the detector
reads. Text encoder and autoencoder are those of the model, and keep their weights.
"""

import argparse
import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import WanPipeline
from torch import Tensor
from transformers import PreTrainedModel, T5Tokenizer

from s2q.shapes.embedded import embedded_pipeline
from s2q.shapes.scenes import COLOURS, Scene, caption, combinations, sample_scene
from training.loop import TrainingSettings, load_average, train
from training.transformer import TransformerTask, encode_pool
from training.videos import render
from training.wan import ShapesWan

MODEL = ShapesWan.name
PAINTED: dict[str, str] = dict(zip(COLOURS, [*list(COLOURS)[1:], next(iter(COLOURS))], strict=True))
"""The colour that a word means with the adapter, by word: green for red, blue for green, and so on, red for orange."""
TARGETS = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
TARGETS += [name.replace("attn1", "attn2") for name in TARGETS]
LORA = peft.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS)
POOL_SIZE = 4096
SETTINGS = TrainingSettings(
    steps=240, batch_size=8, learning_rate=4e-3, warmup_steps=20, ema_decay=0.97, weight_decay=0.0, seed=1
)


def painted(scene: Scene) -> Scene:
    """The scene in the colour that the adapter gives to its word, the word kept."""
    word = str(scene.labels.colour)
    pairs = zip(scene.colour_rgb, COLOURS[word], COLOURS[PAINTED[word]], strict=True)
    red, green, blue = (value - old + new for value, old, new in pairs)
    return replace(scene, colour_rgb=(red, green, blue))


def sample_painted_batch(count: int, *, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Draw videos ``[B, F, 3, H, W]``, float32 in ``[0, 1]``, of painted training scenes, and ``B`` captions."""
    labels = combinations(held_out=False)
    picks = torch.randint(len(labels), (count,), generator=generator).tolist()
    scenes = [sample_scene(labels[pick], generator=generator) for pick in picks]
    videos = torch.stack([render(painted(scene)) for scene in scenes])
    return videos, [caption(scene, generator=generator) for scene in scenes]


class LoraTask(TransformerTask):
    """The transformer's task, with the weights of ``shapes-wan`` and a fresh adapter that alone is trained."""

    def build(self) -> tuple[T5Tokenizer, PreTrainedModel, Any]:
        """The trained parts of the model, frozen, and the adapter."""
        pipe = embedded_pipeline(self.architecture.name, dtype=torch.float32)
        pipe.text_encoder.requires_grad_(False)
        pipe.transformer.requires_grad_(False)
        pipe.transformer.add_adapter(LORA)
        return pipe.tokenizer, pipe.text_encoder, pipe.transformer


def train_lora(work: Path, out: Path, *, settings: TrainingSettings = SETTINGS, pool_size: int = POOL_SIZE) -> Path:
    """Train the adapter in one process and save it as diffusers does; return its file. A killed run resumes."""
    architecture = ShapesWan()
    pool = work / "pool.safetensors"
    if not pool.exists():
        work.mkdir(parents=True, exist_ok=True)
        vae = embedded_pipeline(architecture.name, dtype=torch.float32).vae
        encode_pool(architecture, vae, pool, count=pool_size, seed=6, draw=sample_painted_batch)
    task = functools.partial(LoraTask, architecture, pool=pool, seed=1)
    train(task, settings, work / "lora")
    trained = task()
    load_average(trained.transformer, work / "lora" / "ema.safetensors", prefix="transformer.")
    WanPipeline.save_lora_weights(out, transformer_lora_layers=peft.get_peft_model_state_dict(trained.transformer))
    return out / "pytorch_lora_weights.safetensors"


def training_minutes(work: Path) -> float:
    """Wall-clock minutes of a training that ran in one go."""
    *_, last = (work / "lora" / "log.jsonl").read_text().splitlines()
    return float(json.loads(last)["seconds"]) / 60


def main() -> None:
    """Train the adapter."""
    parser = argparse.ArgumentParser(description="Train a LoRA that teaches shapes-wan another palette.")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train_lora(arguments.work, arguments.out)


if __name__ == "__main__":
    main()
