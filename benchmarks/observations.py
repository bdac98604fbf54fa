"""What the method rests on, measured on an embedded model: attention mass, salience, outliers.

    python benchmarks/observations.py [-m shapes-cogvideox] [--prompts 10] [--plots docs/images]

Writes ``benchmarks/results/observations-MODEL.json`` and three plots. The figures are of the full-precision model
along its own denoising trajectory, both guidance branches.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from environment import environment
from matplotlib import pyplot as plt
from records import write_record
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from s2q.models import family_of
from s2q.models.family import block_linears
from s2q.shapes.embedded import embedded_pipeline, embedded_prompts, generation_defaults

RESULTS = Path(__file__).parent / "results"
TOP_FRACTION = 0.1


class AttentionMass(TorchFunctionMode):
    """Of every attention call: the share that the most attended ``TOP_FRACTION`` of the keys receive."""

    def __init__(self, *, text_tokens: int) -> None:
        super().__init__()
        self.text_tokens = text_tokens
        self.top: list[Tensor] = []  # a tensor [B] a call
        self.text: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].shape[-2] > self.text_tokens:
            query, key = args[0].float(), args[1].float()
            weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
            received = weights.sum(dim=(1, 2))  # S_j of eq. 11, [B, N]
            share = received / received.sum(-1, keepdim=True)
            count = round(TOP_FRACTION * share.shape[-1])
            self.top.append(share.topk(count, dim=-1).values.sum(-1))
            self.text.append(share[:, : self.text_tokens].sum(-1))
        return func(*args, **kwargs)


class InputOutliers:
    """Of every block linear's input: the largest over the median of the channels' absolute maxima."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.ratios: dict[str, list[float]] = defaultdict(list)
        self.handles = [
            transformer.get_submodule(linear.name).register_forward_pre_hook(self._hook(linear.name))
            for linear in block_linears(transformer, family_of(transformer))
            if linear.role == "linear"
        ]

    def _hook(self, name: str):
        def record(_module, inputs):
            peak = inputs[0].detach().float().abs().flatten(0, -2).amax(0)
            self.ratios[name].append(float(peak.amax() / peak.median().clamp_min(1e-12)))

        return record


@torch.no_grad()
def observe(model: str, *, num_prompts: int) -> dict:
    """Run the pipeline on calibration prompts, one at a time, and record every transformer call."""
    pipeline = embedded_pipeline(model, dtype=torch.float32)
    blocks, steps = len(pipeline.transformer.transformer_blocks), None
    settings, per_prompt = generation_defaults(model), []
    prompts = embedded_prompts(model, split="calibration", count=num_prompts)
    for seed, prompt in enumerate(prompts):
        outliers = InputOutliers(pipeline.transformer)
        latents: list[Tensor] = []

        def keep(_pipe, _step, _timestep, values, latents=latents):
            latents.append(values["latents"].float().clone())
            return {}

        mass = AttentionMass(text_tokens=pipeline.transformer.config.max_text_seq_length)
        with mass:
            generator = torch.Generator().manual_seed(seed)
            first = torch.randn(1, 3, 16, 8, 8, generator=generator)
            pipeline(
                prompt=prompt,
                latents=first.clone(),
                output_type="latent",
                callback_on_step_end=keep,
                max_sequence_length=pipeline.transformer.config.max_text_seq_length,
                **settings,
            )
        for handle in outliers.handles:
            handle.remove()
        steps = settings["num_inference_steps"]
        top = torch.stack(mass.top).view(steps, blocks, -1).mean(-1)  # [step, block]
        text = torch.stack(mass.text).view(steps, blocks, -1).mean(-1)
        trajectory = [first, *latents]
        c_diff, c_quant = [], []
        for before, after in zip(trajectory[:-1], trajectory[1:], strict=True):
            c_diff.append(float((before - after).square().sum() / before.square().sum()))  # eq. 3
            tokens = before[0].permute(0, 2, 3, 1).reshape(-1, before.shape[2])
            c_quant.append(float(torch.linalg.matrix_norm(tokens.T @ tokens, 2)))  # eq. 6
        per_prompt.append({"top": top, "text": text, "c_diff": c_diff, "c_quant": c_quant, "outliers": outliers.ratios})
    timesteps = [int(t) for t in pipeline.scheduler.timesteps]
    names = list(per_prompt[0]["outliers"])
    return {
        "schema_version": 1,
        "model": model,
        "prompts": prompts,
        "settings": settings,
        "timesteps": timesteps,
        "attention_mass_top_10_percent": torch.stack([p["top"] for p in per_prompt]).mean(0).T.tolist(),
        "attention_mass_text": torch.stack([p["text"] for p in per_prompt]).mean(0).T.tolist(),
        "c_diff": [p["c_diff"] for p in per_prompt],
        "c_quant": [p["c_quant"] for p in per_prompt],
        "input_max_over_median": {
            name: torch.tensor([p["outliers"][name] for p in per_prompt])
            .view(num_prompts, steps, -1)
            .mean((0, 2))
            .tolist()
            for name in names
        },
        **environment(),
    }


def plot(result: dict, folder: Path) -> None:
    """Three figures, named after the model."""
    folder.mkdir(parents=True, exist_ok=True)
    timesteps, model = result["timesteps"], result["model"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for block, values in enumerate(result["attention_mass_top_10_percent"]):
        left.plot(timesteps, values, label=f"block {block}", color=plt.cm.viridis(block / 6))
    for block, values in enumerate(result["attention_mass_text"]):
        right.plot(timesteps, values, color=plt.cm.viridis(block / 6))
    left.axhline(TOP_FRACTION, color="0.6", linestyle=":", label="uniform attention")
    left.set(title="attention mass on the top 10 % of tokens", xlabel="timestep", ylabel="share", ylim=(0, 0.6))
    right.set(title="attention mass on text tokens", xlabel="timestep", ylim=(0, 0.6))
    left.legend(fontsize=7)
    _finish(figure, (left, right), folder / f"{model}-attention-mass.png")

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    diff, quant = torch.tensor(result["c_diff"]), torch.tensor(result["c_quant"])
    product = _unit(diff) * _unit(quant)
    titles = ("C_diff (eq. 3)", "C_quant (eq. 6)", "salience: product of both (eq. 8)")
    for axis, values, title in zip(axes, (diff, quant, product), titles, strict=True):
        image = axis.imshow(values, aspect="auto", cmap="viridis")
        axis.set(title=title, xlabel="timestep", ylabel="prompt", xticks=range(0, len(timesteps), 4))
        axis.set_xticklabels(timesteps[::4])
        axis.set_yticks(range(len(values)))
        figure.colorbar(image, ax=axis)
    figure.savefig(folder / f"{model}-salience.png", dpi=110)
    plt.close(figure)

    names = list(result["input_max_over_median"])
    figure, axis = plt.subplots(figsize=(9, 6.5), constrained_layout=True)
    values = torch.tensor([result["input_max_over_median"][name] for name in names])
    image = axis.imshow(values.log10(), aspect="auto", cmap="magma")
    axis.set(title="input outliers: channel maximum, largest over median (log10)", xlabel="timestep")
    axis.set_yticks(range(len(names)), [n.removeprefix("transformer_blocks.") for n in names], fontsize=7)
    axis.set_xticks(range(0, len(timesteps), 2), timesteps[::2])
    figure.colorbar(image, ax=axis)
    figure.savefig(folder / f"{model}-input-outliers.png", dpi=110)
    plt.close(figure)


def _unit(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())


def _finish(figure, axes, path: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.invert_xaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Observe, save, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="shapes-cogvideox")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--plots", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    plt.switch_backend("Agg")
    result = observe(arguments.model, num_prompts=arguments.prompts)
    write_record(RESULTS / f"observations-{arguments.model}.json", result)
    plot(result, arguments.plots)


if __name__ == "__main__":
    main()
