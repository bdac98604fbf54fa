"""What a run is to do: which checkpoints and which judged pieces there are to be, where they lie, by which commands.

Everything lies in one folder under names that end in a hash of what it was made from, so that whatever is there was
made with the same settings, and different settings have different names:

    checkpoints/VARIANT-SEED-HASH/              an s2q checkpoint
    evals/VARIANT-SEED-HASH/HASH.json           a piece: a few prompts, judged against full precision
    videos/VARIANT-SEED-HASH-HASH/PROMPT-N.mp4  every judged video, and full precision's
    tables/TABLE.json, TABLE.md                 our figures beside the paper's
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reproduce.specs import Row, Table, row_overrides
from s2q.common.files import slug
from s2q.recipes.load import load_recipe

_FILE_NAME = re.compile(r"[^/\0]{1,120}")
_FLAGS = {
    "num_frames": "--num-frames",
    "height": "--height",
    "width": "--width",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for.

    Attributes:
        model: The full-precision model, as on the command line.
        out: The folder of everything.
        prompts: The prompts that are judged.
        prompts_file: Their file; None for the embedded models' own.
        calibration_prompts: The prompts that are calibrated on; None for the embedded models' own.
        calibration_file: Their file.
        seeds: Videos a prompt.
        settings: Generation settings that differ from the model's own.
        changes: Overrides for all rows.
        device: "cpu", "cuda", "cuda:N".
        dtype: Compute dtype; None is the stored one.
        piece: Prompts that are judged together.
    """

    model: str
    out: Path
    prompts: Sequence[str]
    prompts_file: Path | None = None
    calibration_prompts: Sequence[str] | None = None
    calibration_file: Path | None = None
    seeds: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    changes: Sequence[str] = ()
    device: str = "cpu"
    dtype: str | None = None
    piece: int = 4

    def pieces(self) -> Iterator[Sequence[str]]:
        """Yield the prompts, some at a time."""
        for start in range(0, len(self.prompts), self.piece):
            yield self.prompts[start : start + self.piece]

    def full_precision_videos(self) -> Path:
        """Return the folder of full precision's videos."""
        return self.out / "videos" / f"full-precision-{self.judging}"

    @property
    def judging(self) -> str:
        """Hash of how videos are generated."""
        return _hash(self.model, self.device, self.dtype, self.settings)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row, quantized once.

    Attributes:
        row: The row; it has a recipe.
        seed: Seed of the run.
    """

    row: Row
    seed: int
    request: Request

    @property
    def key(self) -> str:
        """Name of its checkpoint."""
        assert self.row.variant is not None
        recipe = load_recipe(self.row.variant.recipe, overrides=self._overrides).resolved()
        asked = self.request
        content = (asked.model, recipe, self.seed, asked.calibration_prompts, asked.device, asked.dtype)
        return f"{self.row.variant.name}-{self.seed}-{_hash(*content)}"

    @property
    def checkpoint(self) -> Path:
        """Its checkpoint."""
        return self.request.out / "checkpoints" / self.key

    @property
    def videos(self) -> Path:
        """The folder of its videos."""
        return self.request.out / "videos" / f"{self.key}-{self.request.judging}"

    def record(self, prompts: Sequence[str]) -> Path:
        """Return the results file of a piece."""
        name = _hash(self.request.judging, list(prompts), self.request.seeds)
        return self.request.out / "evals" / self.key / f"{name}.json"

    def missing(self) -> list[Sequence[str]]:
        """Return the pieces that have not been judged."""
        return [prompts for prompts in self.request.pieces() if not self.record(prompts).exists()]

    def quantize_command(self) -> list[str]:
        """Return the arguments of `s2q` that make the checkpoint."""
        assert self.row.variant is not None
        asked = self.request
        command = ["quantize", "-m", asked.model, "-r", self.row.variant.recipe, "-o", str(self.checkpoint)]
        if asked.calibration_file is not None:
            command += ["--prompts", str(asked.calibration_file)]
        command += [part for override in self._overrides for part in ("--set", override)]
        return [*command, "--seed", str(self.seed), *_where(asked)]

    def eval_command(self) -> list[str]:
        """Return the arguments of `s2q` that judge the checkpoint on all prompts at once."""
        asked = self.request
        command = ["eval", "-m", str(self.checkpoint), "--reference", asked.model, "--seeds", str(asked.seeds)]
        if asked.prompts_file is None:
            command += ["--num-prompts", str(len(asked.prompts))]
        else:
            command += ["--prompts", str(asked.prompts_file)]
        output = ["-o", str(asked.out / "evals" / f"{self.key}.json")]
        return [*command, *_generation(asked), *_where(asked), *output]

    @property
    def _overrides(self) -> tuple[str, ...]:
        assert self.row.variant is not None
        return row_overrides(self.row.variant, self.request.changes)


def runs_of(table: Table, request: Request) -> list[Run]:
    """Return what is quantized for a table: each row with a recipe, with every seed."""
    rows = [row for row in table.rows if row.runs]
    return [Run(row=row, seed=seed, request=request) for seed in range(table.runs) for row in rows]


def bench_command(names: Sequence[str], request: Request, *, model: str) -> list[str]:
    """Return the arguments of `s2q` that time denoising steps.

    Args:
        model: What is timed, "synthetic:cogvideox-5b".
    """
    file = str(request.out / "bench.json")
    command = ["bench", "-m", model, "--ops", "denoising_step", "-r", ",".join(names)]
    return [*command, "--device", request.device, "-o", file]


def shown(command: Sequence[str]) -> str:
    """Return arguments of `s2q` as a line for a shell."""
    return shlex.join(["s2q", *command])


def video_name(prompt: str, seed: int) -> str:
    """Return the file name that VBench expects of a video, or a safe one where a prompt cannot be a name."""
    if _FILE_NAME.fullmatch(prompt):
        return f"{prompt}-{seed}.mp4"
    return f"{slug(prompt)}-{_hash(prompt)}-{seed}.mp4"


def _generation(request: Request) -> list[str]:
    return [part for name, value in request.settings.items() for part in (_FLAGS[name], str(value))]


def _where(request: Request) -> list[str]:
    dtype = ["--dtype", request.dtype] if request.dtype else []
    return ["--device", request.device, *dtype]


def _hash(*content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
