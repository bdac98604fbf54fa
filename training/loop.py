"""One training loop for every part: data parallel over processes, resumable, the same on CPU and GPU.

The data of a step depends on (seed, step, process) alone and the learning rate on the step alone, so a killed
run resumes from its last checkpoint with the same result. Checkpoints are safetensors: weights, their
exponential moving average (EMA) and the optimisers' state.
"""

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save
from torch import Tensor, nn

from s2q.common.files import atomic_write_bytes
from s2q.common.seeds import derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of training; ``batch_size`` is of all processes together, ``muon`` gives hidden matrices to Muon."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    final_learning_rate_fraction: float = 0.02
    weight_decay: float = 0.01
    muon: bool = False
    ema_decay: float = 0.998
    gradient_clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 200
    log_every: int = 20


class Task(Protocol):
    """A training task: the modules, and the loss of one batch."""

    modules: nn.ModuleDict

    def loss(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The scalar loss of a fresh batch, and figures to log."""
        ...


def learning_rate_factor(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up, then a cosine down to ``final_learning_rate_fraction``."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    floor = settings.final_learning_rate_fraction
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Muon takes hidden matrices; embeddings, first and last projections stay with AdamW, as its authors advise."""
    outer = ("shared", "embed_tokens", "proj_out", "patch_embed", "relative_attention_bias")
    return parameter.ndim == 2 and not any(part in name for part in outer)


def build_optimizers(modules: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""
    named = [(name, p) for name, p in modules.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if settings.muon and _is_matrix(name, p)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return optimizers


def train(
    build_task: Callable[[], Task], settings: TrainingSettings, folder: Path, *, processes: int = 1, device: str = "cpu"
) -> None:
    """Train until ``settings.steps``; resume from ``folder`` if it has a checkpoint of the same settings.

    ``build_task`` makes the task in each process, hence must be picklable. ``state.safetensors``, ``ema.safetensors``,
    ``settings.json`` and ``log.jsonl`` go to ``folder``. On a CPU each of the data-parallel processes has one thread.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if processes == 1:
        _worker(0, 1, "", build_task, settings, folder, device)
        return
    with tempfile.TemporaryDirectory() as rendezvous:
        mp.start_processes(
            _worker,
            args=(processes, f"file://{rendezvous}/store", build_task, settings, folder, device),
            nprocs=processes,
            start_method="spawn",
        )


def _worker(
    rank: int,
    world: int,
    rendezvous: str,
    build_task: Callable[[], Task],
    settings: TrainingSettings,
    folder: Path,
    device: str,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if world > 1:
        torch.set_num_threads(1)
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", init_method=rendezvous, rank=rank, world_size=world
        )
    task = build_task()
    task.modules.to(device).train()
    run = _Run(task.modules, settings, folder, world)
    first = run.restore()
    if first >= settings.steps:
        logger.info("%s: already trained for %d steps", folder.name, first)
    started, per_process = time.monotonic(), settings.batch_size // world
    for step in range(first, settings.steps):
        generator = torch.Generator().manual_seed(derive_seed(settings.seed, "step", step, rank))
        loss, figures = task.loss(per_process, generator)
        loss.backward()
        run.step(step)
        done = step + 1
        if rank == 0 and (done % settings.log_every == 0 or done == settings.steps):
            elapsed = time.monotonic() - started
            left = elapsed / (done - first) * (settings.steps - done)
            _log(folder, {"step": done, "loss": float(loss.detach()), **figures, "seconds": round(elapsed, 1)}, left)
        if rank == 0 and (done % settings.checkpoint_every == 0 or done == settings.steps):
            run.save(done)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


class _Run:
    """State of a training run: learned parameters by name, their averages, and the optimizers."""

    def __init__(self, modules: nn.Module, settings: TrainingSettings, folder: Path, world: int) -> None:
        self.modules, self.settings, self.folder, self.world = modules, settings, folder, world
        self.optimizers = build_optimizers(modules, settings)
        self.learned = {name: p for name, p in modules.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.learned.items()}

    def step(self, step: int) -> None:
        parameters = [p for p in self.modules.parameters() if p.grad is not None]
        if self.world > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            dist.all_reduce(flat)
            flat /= self.world
            for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = piece.view_as(p)
        nn.utils.clip_grad_norm_(parameters, self.settings.gradient_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * learning_rate_factor(step, self.settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(self.settings.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, p in self.learned.items():
                self.ema[name].lerp_(p, 1 - decay)

    def save(self, step: int) -> None:
        """One file for the whole state, so that it is never of two steps; the EMA beside it for use."""
        state = {"step": torch.tensor(step)}
        for name, p in self.learned.items():
            state |= {f"weights.{name}": p, f"ema.{name}": self.ema[name]}
        for i, optimizer in enumerate(self.optimizers):
            for index, values in optimizer.state_dict()["state"].items():
                state |= {f"optimizer.{i}.{index}.{key}": value for key, value in values.items()}
        _save(state, self.folder / "state.safetensors")
        _save(self.ema, self.folder / "ema.safetensors")
        (self.folder / "settings.json").write_text(json.dumps(asdict(self.settings), indent=2) + "\n")

    def restore(self) -> int:
        """Load the checkpoint of the folder and return its number of steps; 0 without one."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return 0
        saved, given = json.loads((self.folder / "settings.json").read_text()), asdict(self.settings)
        if saved != given:
            raise ValueError(f"{self.folder}: contains a run with settings {saved}, not {given}; use another folder")
        tensors = load_file(path)
        with torch.no_grad():
            for name, p in self.learned.items():
                p.copy_(tensors[f"weights.{name}"])
                self.ema[name].copy_(tensors[f"ema.{name}"])
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"optimizer.{i}."):
                    _, _, index, key = name.split(".", 3)
                    state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(tensors["step"])


def _log(folder: Path, entry: dict[str, float], seconds_left: float) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
    figures = "  ".join(f"{key} {value:.4g}" for key, value in entry.items() if key not in ("step", "seconds"))
    logger.info("%s step %d  %s  (%.0f min left)", folder.name, entry["step"], figures, seconds_left / 60)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    atomic_write_bytes(path, save({name: t.detach().contiguous().cpu() for name, t in tensors.items()}))


def load_average(modules: nn.Module, path: Path, *, prefix: str) -> None:
    """Copy the averaged (EMA) weights of one part out of a training folder's ``ema.safetensors``."""
    tensors = {n.removeprefix(prefix): t for n, t in load_file(path).items() if n.startswith(prefix)}
    parameters = dict(modules.named_parameters())
    unknown = sorted(set(tensors) - set(parameters))
    if unknown or not tensors:
        raise ValueError(f"{path}: holds {unknown[:3] or 'nothing'} under {prefix!r}, which the model does not have")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
