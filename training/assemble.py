"""From trained parts to a shipped folder: a diffusers pipeline, a training card and curves."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX

from s2q.common.files import atomic_write_json, atomic_write_text
from s2q.shapes.embedded import embedded_pipeline
from s2q.shapes.scenes import SceneLabels
from training.architecture import EmbeddedArchitecture, build_pipeline
from training.loop import load_average
from training.quality import label_accuracy
from training.vae import normalised_vae
from training.videos import sample_batch


def taught_vae(architecture: EmbeddedArchitecture, run: Path) -> Any:
    """The autoencoder that learned another one's latents."""
    vae = architecture.build_vae().eval()
    load_average(vae, run / "ema.safetensors", prefix="vae.")
    return vae


def finished_vae(vae_run: Path, decoder_run: Path) -> AutoencoderKLCogVideoX:
    """CogVideoX's autoencoder after both of its training stages."""
    vae = normalised_vae(vae_run)
    load_average(vae, decoder_run / "ema.safetensors", prefix="vae.")
    return vae


@torch.no_grad()
def reconstruction_quality(vae: Any, labels: Sequence[SceneLabels], *, seed: int) -> dict[str, float]:
    """PSNR in dB (of the pooled error) and the detector's accuracy on reconstructed scenes."""
    videos, _ = sample_batch(labels, generator=torch.Generator().manual_seed(seed))
    output = []
    for batch in videos.split(32):
        latent = vae.encode(batch.permute(0, 2, 1, 3, 4) * 2 - 1).latent_dist.mean
        output.append((vae.decode(latent).sample.permute(0, 2, 1, 3, 4) / 2 + 0.5).clamp(0, 1))
    rebuilt = torch.cat(output)
    psnr = float(-10 * torch.log10((rebuilt - videos).square().mean()))
    return {"psnr_db": psnr, **label_accuracy(rebuilt, labels)}


def assemble(architecture: EmbeddedArchitecture, vae: Any, transformer_run: Path, out: Path, *, seed: int) -> Any:
    """Write the diffusers folder in bfloat16 with an autoencoder of normalised latents; ``out`` is replaced."""
    pipeline, trained = build_pipeline(architecture, seed=seed), ["transformer"]
    pipeline.register_modules(vae=vae)
    if architecture.starts_from is None:
        trained.append("text_encoder")
    else:
        start = embedded_pipeline(architecture.starts_from, dtype=torch.float32)
        pipeline.text_encoder.load_state_dict(start.text_encoder.state_dict())
    for part in trained:
        load_average(getattr(pipeline, part), transformer_run / "ema.safetensors", prefix=f"{part}.")
    pipeline.to(torch.bfloat16)
    shutil.rmtree(out, ignore_errors=True)
    pipeline.save_pretrained(out)
    _declare_float32(out / "text_encoder" / "config.json")
    atomic_write_json(out / "generation.json", architecture.generation)
    return pipeline


def _declare_float32(config: Path) -> None:
    """Without a dtype diffusers loads its parts in float32 and transformers in the declared dtype: make them agree."""
    declared = json.loads(config.read_text())
    atomic_write_json(config, declared | {"dtype": "float32"})


def plot_losses(runs: dict[str, Path], path: Path) -> None:
    """One curve a stage, from each run's ``log.jsonl``: thin the logged loss, thick its running mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(4.5 * len(runs), 3.2), squeeze=False, constrained_layout=True)
    for axis, (title, folder) in zip(axes[0], runs.items(), strict=True):
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        steps, losses = [e["step"] for e in entries], torch.tensor([e["loss"] for e in entries])
        window = max(1, len(losses) // 40)
        smooth = losses.unfold(0, window, 1).mean(-1)
        axis.plot(steps, losses, color="0.8", linewidth=0.8)
        axis.plot(steps[window - 1 :], smooth, color="tab:blue")
        axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_card(architecture: EmbeddedArchitecture, out: Path, facts: dict[str, Any]) -> None:
    """The training card: ``README.md`` for people, ``training.json`` with the same figures for programs."""
    atomic_write_json(out / "training.json", facts)
    lines = [
        f"# {architecture.name}",
        "",
        architecture.title,
        f"{_start(architecture)} on procedurally drawn videos of one moving shape (`s2q.shapes.scenes`). No other data",
        f"{_other_weights(architecture)} It is there so that quantization can be tried and judged anywhere, offline.",
        "",
        "![loss](losses.png)",
        "",
        "![samples](samples.png)",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in facts.items()),
        "",
        f"Rebuild in a clone of the repository: `python -m training {architecture.name} --work DIR --out DIR`.",
        "",
    ]
    atomic_write_text(out / "README.md", "\n".join(lines))


def _start(architecture: EmbeddedArchitecture) -> str:
    """The origin of the weights, as the end of the sentence that begins with the title."""
    if architecture.starts_from is None:
        return "trained from nothing"
    frozen = "text encoder and autoencoder\nfrozen,"
    return f"whose transformer was trained from that of `{architecture.starts_from}`, {frozen}"


def _other_weights(architecture: EmbeddedArchitecture) -> str:
    """The end of the sentence that says what went into a model besides its data."""
    if architecture.starts_from is not None:
        return f"went into it, but other weights did: those of `{architecture.starts_from}`."
    if architecture.latents_of is None:
        return "or weights went into it."
    teacher = f"the autoencoder of `{architecture.latents_of}`"
    return f"went into it, but other weights did: those of {teacher}, whose latents its own\nwas taught."


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
    return str(value)
