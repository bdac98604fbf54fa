"""A process that has imported everything and loads mutated files in copies of itself, with limits of memory and time.

It reads a request a line and answers with a line for each job, both JSON. A job is a kind and a seed, see `JOBS`.
"""

import builtins
import contextlib
import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from hostile import mutations
from hostile.foreign_code import ask_for_code, source

READY = "ready"
SECONDS = 10
WALL_SECONDS = 60  # other processes use the machine too
SPARE_BYTES = 1 << 30
SHORT_RECIPE = b"extends: s2q-w4a6\nname: mine\nweights:\n  num_bits: 4\n# few\ndistillation: {epochs: 2, lr: 1e-3}\n"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


class Jobs:
    """What is done with a seed, by kind; each returns verdict and file, see `Outcome` in `test_mutations`."""

    def __init__(self, checkpoint: Path, scratch: Path) -> None:
        self.checkpoint, self.scratch = checkpoint, scratch
        self.canary = scratch / "canary"
        self.recipe = Path("recipe.yaml")
        self.recipe_texts = recipe_texts()
        package = scratch / "evil_package"
        package.mkdir(exist_ok=True)
        for module in (scratch / "evil_module.py", package / "__init__.py", package / "inner.py"):
            module.write_text(source(self.canary))
        original = self.load(checkpoint)
        self.original, self.tensors = self.digest(original), self.structure(original)

    def load(self, folder: Path):
        import s2q

        return s2q.load(folder)

    def digest(self, pipe) -> str:
        """A hash of all tensors, configurations and tokenizers of a pipeline."""
        from torch import nn

        hashed = hashlib.sha256(type(pipe).__name__.encode())
        for name, part in sorted(pipe.components.items()):
            hashed.update(f"{name} {type(part).__name__}".encode())
            if isinstance(part, nn.Module):
                for key, value in part.state_dict().items():
                    hashed.update(f"{key} {value.dtype} {list(value.shape)}".encode())
                    plain = getattr(value, "plain", value).detach().contiguous()
                    hashed.update(bytes(plain.untyped_storage()) if plain.numel() else b"")
            config = getattr(part, "config", None)
            content = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
            for key in ("_name_or_path", "quantization_config"):
                content.pop(key, None)
            hashed.update(json.dumps(content, sort_keys=True, default=str).encode())
            tokenizer = getattr(part, "backend_tokenizer", None)
            if tokenizer is not None:
                hashed.update(tokenizer.to_str().encode() + str(part.special_tokens_map).encode())
        return hashed.hexdigest()

    def structure(self, pipe) -> list:
        """Names, shapes and dtypes of all tensors."""
        from torch import nn

        parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        return sorted(
            (name, key, str(value.dtype), tuple(value.shape))
            for name, part in parts.items()
            for key, value in part.state_dict().items()
        )

    def mutated(self, seed: int, folder: Path, *, within: str = "", rebuild: bool) -> str | None:
        """Mutate a file of a copy of the checkpoint; return its name, or None if it is as before."""
        from s2q.checkpoint import write_manifest

        random_ = random.Random(seed)
        shutil.copytree(self.checkpoint, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        names = [name for name in names if name.startswith(within) and not (rebuild and name.startswith("s2q/"))]
        # a third of all in the file that matters most
        name = WEIGHTS if random_.random() < 1 / 3 else random_.choice(names)
        path = folder / name
        content = path.read_bytes()
        known = {".json": mutations.json_text, ".safetensors": mutations.safetensors}.get(path.suffix)
        blind = known is None or random_.random() < (0.2 if rebuild else 0.5)
        path.write_bytes(mutations.blind(content, random_) if blind else known(content, random_))
        if rebuild:
            write_manifest(folder)
        return None if path.read_bytes() == content else name

    def as_it_is(self, seed: int, folder: Path) -> tuple[str, str]:
        """The manifest is the original's: every altered byte is noticed."""
        name = self.mutated(seed, folder, rebuild=False)
        return self.verdict(lambda: self.load(folder), name)

    def rebuilt(self, seed: int, folder: Path) -> tuple[str, str]:
        """The manifest fits the altered file: what the tensors and configurations must be is all that is known."""
        name = self.mutated(seed, folder, rebuild=True)
        return self.verdict(lambda: self.load(folder), name, rebuilt=True)

    def plain(self, seed: int, folder: Path) -> tuple[str, str]:
        """diffusers loads the transformer, without a call of s2q."""
        from diffusers import CogVideoXTransformer3DModel

        name = self.mutated(seed, folder, within="transformer/", rebuild=False)
        load = CogVideoXTransformer3DModel.from_pretrained
        return self.verdict(lambda: load(folder, subfolder="transformer"), name, plain=True)

    def inspected(self, seed: int, folder: Path) -> tuple[str, str]:
        """`inspect --verify` looks at a file, which may be the model card too."""
        import s2q

        name = self.mutated(seed, folder, rebuild=False)

        def inspect():
            report = s2q.inspect(folder, verify=True)
            if report.problems:
                raise s2q_error()(f"{folder}: {report.problems[0]}")
            return None

        return self.verdict(inspect, name)

    def code(self, seed: int, folder: Path) -> tuple[str, str]:
        """The folder asks for code to be run, and its manifest fits."""
        from s2q.checkpoint import write_manifest

        random_ = random.Random(seed)
        shutil.copytree(self.checkpoint, folder)
        done = ask_for_code(folder, random_, self.canary)
        write_manifest(folder)
        verdict, what = self.verdict(lambda: self.load(folder), done, rebuilt=True, named=False)
        return verdict, what

    def recipes(self, seed: int, folder: Path) -> tuple[str, str]:
        """A recipe file."""
        from s2q.recipes import load_recipe
        from s2q.recipes.schema import Recipe

        random_ = random.Random(seed)
        folder.mkdir()
        path = folder / self.recipe
        content = random_.choice(self.recipe_texts)
        if random_.random() < 0.3:
            path.write_bytes(mutations.blind(content, random_))
        else:
            path.write_bytes(mutations.yaml_text(content, random_, self.canary))
        try:
            recipe = load_recipe(path)
        except s2q_error() as error:
            return self.refused(error, path.name)
        assert isinstance(recipe, Recipe)
        return "valid", path.name

    def prompts(self, seed: int, folder: Path) -> tuple[str, str]:
        """A prompt file."""
        from s2q.generation.prompts import read_prompts

        random_ = random.Random(seed)
        folder.mkdir()
        path = folder / "prompts.txt"
        content = "\n".join(["# scenes", "a red circle", "", "un café à Paris", "a cat, a dog", "\u732b"]).encode()
        blind = random_.random() < 0.3
        path.write_bytes((mutations.blind if blind else mutations.prompt_text)(content, random_))
        try:
            found = read_prompts(path)
        except s2q_error() as error:
            return self.refused(error, path.name)
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        expected = [line.strip() for line in text.split("\n")]
        right = found == [line for line in expected if line and not line.startswith("#")]
        return ("valid" if right else "other prompts"), path.name

    def refused(self, error: Exception, name: str | None) -> tuple[str, str]:
        """An error of s2q, which names the file or what is in it."""
        text = str(error)
        if "\n" in text or len(text) > 4100 or any(ord(character) < 32 for character in text):
            return "unclear error", text[:500]
        parts = () if name is None else (name, name.split("/")[0], "manifest" if "manifest" in name else name)
        if name == "transformer/config.json":  # of which diffusers gives the quantizer this part
            parts += ("quantization_config",)
        named = name is None or any(part in text for part in parts)
        return ("error" if named else "error without the file"), text[:300]

    def verdict(self, load, name, *, rebuilt: bool = False, plain: bool = False, named: bool = True) -> tuple[str, str]:
        try:
            loaded = load()
        except s2q_error() as error:
            return self.refused(error, name if named else None)
        except Exception as error:  # diffusers' own, which s2q does not see
            return ("error" if plain else "traceback"), f"{name}: {type(error).__name__}: {str(error)[:300]}"
        if name is None:
            return "identical", "unchanged"
        if plain or loaded is None:
            return "not noticed", name
        if self.digest(loaded) == self.original:
            return "identical", name
        if not rebuilt:
            return "not noticed", name
        return ("other values" if self.structure(loaded) == self.tensors else "other structure"), name


def recipe_texts() -> list[bytes]:
    """Recipes as files: whole ones, and a short one that extends another."""
    import yaml

    from s2q.recipes import load_recipe

    names = ("rtn-w4a6", "s2q-w4a6", "svdquant-w4a8", "s2q-plus-w4a6")
    whole = [yaml.safe_dump(load_recipe(name).model_dump(mode="json"), sort_keys=False).encode() for name in names]
    return [*whole, SHORT_RECIPE]


def s2q_error() -> type[Exception]:
    from s2q.common.errors import S2QError

    return S2QError


def refuse(asked: list[str], what: str) -> None:
    """Note that something was asked for which loading a file must not need."""
    asked.append(what)
    raise OSError(f"no {what} here")


def start(jobs: Jobs, kind: str, seeds: list[int], answers: int) -> int:
    """Do jobs in a copy of this process, one answer a line."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        asked: list[str] = []
        socket.socket.connect = lambda self, address: refuse(asked, str(address))
        builtins.input = lambda *args: refuse(asked, "input")
        os.chdir(jobs.scratch)
        sys.path.insert(0, "")
        for seed in seeds:
            os.write(answers, json.dumps({"seed": seed, "begins": True}).encode() + b"\n")
            folder = jobs.scratch / f"{kind}-{seed}"
            began, cpu = time.monotonic(), time.process_time()
            try:
                verdict, what = getattr(jobs, kind)(seed, folder)
            except MemoryError:
                verdict, what = "traceback", "MemoryError"
            except Exception as error:
                verdict, what = "traceback", f"{type(error).__name__}: {error}"
            answer = {
                "seed": seed,
                "kind": kind,
                "verdict": verdict,
                "what": what,
                "seconds": time.monotonic() - began,
                "cpu_seconds": time.process_time() - cpu,
                "executed": jobs.canary.exists() or bool(asked),
            }
            shutil.rmtree(folder, ignore_errors=True)
            jobs.canary.unlink(missing_ok=True)
            os.write(answers, json.dumps(answer).encode() + b"\n")
    finally:
        os._exit(0)


def serve(jobs: Jobs, kind: str, seeds: list[int]) -> list[dict]:
    """Return the outcome of each seed; a copy that dies or hangs costs its job only."""
    outcomes = []
    left = list(seeds)
    while left:
        reader, writer = os.pipe()
        pid = start(jobs, kind, left, writer)
        os.close(writer)
        lines, current, dead = b"", None, None
        while True:
            ready, _, _ = select.select([reader], [], [], WALL_SECONDS)
            if not ready:
                os.kill(pid, signal.SIGKILL)
                dead = "hang"
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                break
            *complete, lines = (lines + chunk).split(b"\n")
            for line in complete:
                answer = json.loads(line)
                current = answer["seed"]
                if not answer.get("begins"):
                    outcomes.append(answer)
                    current = None
                    left.remove(answer["seed"])
        os.close(reader)
        _, status = os.waitpid(pid, 0)
        if left:
            code = os.waitstatus_to_exitcode(status)
            seed = left[0] if current is None else current
            ended = {"verdict": dead or f"exit {code}", "what": "", "executed": jobs.canary.exists()}
            outcomes.append({"seed": seed, "kind": kind, "seconds": 0.0, "cpu_seconds": 0.0, **ended})
            left.remove(seed)
            with contextlib.suppress(OSError):
                shutil.rmtree(jobs.scratch / f"{kind}-{seed}")
    return outcomes


def main() -> None:
    """Answer requests until standard input ends."""
    import tqdm

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tqdm.tqdm.monitor_interval = 0
    settings = json.loads(sys.argv[1])
    jobs = Jobs(Path(settings["checkpoint"]), Path(settings["scratch"]))
    from diffusers import CogVideoXTransformer3DModel

    from s2q.generation.prompts import read_prompts  # noqa: F401
    from s2q.recipes import load_recipe

    CogVideoXTransformer3DModel.from_pretrained(jobs.checkpoint, subfolder="transformer")
    load_recipe("s2q-w4a6")
    threads = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    print(json.dumps({READY: True, "threads": threads}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        for outcome in serve(jobs, request["kind"], request["seeds"]):
            print(json.dumps(outcome), file=answers)
        print(json.dumps({"end": True}), file=answers, flush=True)


if __name__ == "__main__":
    main()
