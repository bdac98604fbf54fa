"""Commands of README.md and docs/: what tests run of them, with which stand-ins, and what they do not run and why.

A command runs in a folder where each name that the page leaves to the reader, or that is on the Hub, is a tiny random
model, an adapter or a file of prompts. `NOT_RUN`, `REPLACED` and `ADDED` list all that differs from the page.
"""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from PIL import Image
from published import published_models
from reproduce.command import main as reproduce
from safetensors.torch import load_file, save_file

import s2q
from s2q.cli import run as s2q_command
from s2q.recipes.load import recipe_names
from s2q.shapes.embedded import EMBEDDED_NAMES
from tiny import image_prompts, tiny_pipeline
from tiny_families import FAMILIES
from tiny_judges import save_tiny_clip, save_tiny_lpips

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SHELL = ("", "bash", "console", "sh", "shell", "text")
"""Languages of code blocks that may have commands."""
PROGRAM = re.compile(
    r"(?:[A-Z0-9_]+=\S+ )*(?:\S*/)?(?:s2q|python[\d.]*|pip|pipx|uvx?|make|sbatch|srun|ray|git|hf|bash) "
)
"""What a command starts with: variables and a program."""

NOT_RUN = (
    (r"README\.md: make ", "installs PyTorch; `make demo` is `s2q demo`, which tests/cli/test_demo.py runs"),
    (r"quickstart\.md: s2q ", "tests/test_quickstart.py runs them, on the embedded models and a stand-in for the Hub"),
    (r"\S+: (python -m |vbench/bin/)?pip ", "installs packages"),
    (r"judging\.md: python3\.11 -m venv ", "installs packages"),
    (r"judging\.md: S2Q_VBENCH_PYTHON=\S+ python -m pytest ", "needs VBench"),
    (r"judging\.md: s2q eval '…'", "has no model; its options are those of the command above it"),
    (r"scale-out\.md: sbatch ", "needs a cluster; tests/test_examples.py runs the script"),
    (r"scale-out\.md: .* --devices cuda:0,", "needs four GPUs"),
    (r"speed\.md: make ", "takes up to an hour, or needs a GPU"),
    (r"ui\.md: s2q ui\b", "runs until it is stopped; tests/ui and tests/browser use it"),
)
"""Commands that are not run here: a regular expression of page and command, and the reason."""

REPLACED = (
    (r"(?<=--device )cuda\b", "cpu", "no GPU"),
    (r"(?<=--workers )2\b", "1", "other processes do not have the stand-ins"),
    (r"(?<=--vbench-python )\S+", shlex.quote(sys.executable), "tests/fake_vbench.py is a package of this Python"),
    (r"MODEL(?= .*\btransformer_2\b)", "TWO", "has two transformers"),
    (r"CHECKPOINT(?= .* --component )", "PAIR", "has two transformers"),
    (r"MODEL(?=\.safetensors)", "COMFYUI", "a file of a quantized model"),
    (r"--recipes all\b", "--recipes 'rtn-w4a4,s2q-w4a4'", "100 recipes take minutes"),
    (r"'s2q-\*' '\*-w4a4'", "'s2q-*w4a6' 'rtn-*4a4'", "50 recipes take minutes"),
    (r"synthetic:cogvideox-5b(?= --ops)", "shapes-cogvideox", "published dimensions take minutes"),
    (r"CHECKPOINT(?= --ops)", "shapes-w4a6", "its video is small"),
    (r"(?<=-o shapes-tables ).*", "--dry-run", "minutes; tests/test_reproduce.py runs a tiny model"),
)
"""Parts of commands: a regular expression, what is run in its place, and the reason."""

CALIBRATES = r"s2q (quantize .*( -r (?!rtn)|gptq)|compare )"
ADDED = (
    (
        r"s2q (quantize|eval|generate|compare|plan -m (?!synthetic))",
        "--num-frames 25 --height 32 --width 32 --steps 2",
        "tiny models make tiny videos; every autoencoder takes these",
    ),
    (r"s2q (quantize|eval|plan -m (?!synthetic)).*MiniMax-H3", "--num-frames 124", "it makes at least as many"),
    (r"s2q .*CogVideoX1\.5", "--height 16 --width 16", "the tiny model has positions for 16 pixels"),
    (
        r"s2q compare .*-m MODEL ",
        "--set calibration.num_frames=25 --set calibration.height=32 --set calibration.width=32",
        "the size of the videos that are compared is not that of calibration",
    ),
    (CALIBRATES, "--samples 1 --set calibration.n_prompts=1", "time"),
    (r"s2q (quantize .*-r (s2q(?!-export-table)|.*std)|compare)", "--set distillation.epochs=1", "time"),
    (r"s2q quantize .*-r s2q-export-table", "--set refinement.epochs=1", "time"),
    (r"s2q (eval|compare) .* shapes-", "--num-prompts 1 --seeds 1", "time"),
    (r"s2q eval .* --vbench-python", "--vbench-dims subject_consistency", "tests/fake_vbench.py has few"),
    (r"s2q bench$", "-m shapes-cogvideox --ops gemm -r s2q-w4a6 --tokens 1", "published dimensions take half an hour"),
    (r"s2q bench", "--repeats 1 --seconds 0", "time"),
)
"""Options at the end of commands: a regular expression, the options, and the reason."""


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    page: str
    text: str

    @property
    def is_run(self) -> bool:
        """Whether `NOT_RUN` does not list it."""
        return not any(re.match(pattern, f"{self.page}: {self.text}") for pattern, _ in NOT_RUN)

    def runnable(self) -> list[str]:
        """The words of what is run in its place."""
        text = self.text
        for pattern, other, _ in REPLACED:
            text = re.sub(pattern, other, text)
        added = [options for pattern, options, _ in ADDED if re.match(pattern, self.text)]
        return shlex.split(" ".join([text, *added]))


def commands(page: Path) -> Iterator[Command]:
    """Yield the commands in the code blocks of a page, without comments."""
    for language, block in re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines() if language in SHELL else ():
            if PROGRAM.match(f"{line} "):
                yield Command(page.name, shlex.join(shlex.split(line, comments=True)))


def inline_commands(page: Path) -> list[str]:
    """Return the commands in the text of a page, in backquotes."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`((?:s2q|python|make) [^`]+)`", text)


def python_code(page: Path) -> list[str]:
    """Return the Python of a page: its code blocks, and calls of s2q in its text."""
    text = page.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [*blocks, *re.findall(r"`(s2q\.\w+\([^`]*\))`", text)]


PIPELINES = {family.pipeline.__name__: name for name, family in reversed(FAMILIES.items())}
MODELS = {entry["hub"]: entry["pipeline"] for entry in published_models().values()} | {
    "zai-org/CogVideoX1.5-5B": "cogvideox 1.5",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan 2.2 a14b",
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "wan 2.2 a14b image",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "wan 2.2 5b",
    "wan2.2-lightning": "wan 2.2 a14b",
    "MODEL": "wan",
    "PIPELINE": "wan",
    "TWO": "wan 2.2 a14b",
}
"""Names of models, and their tiny pipelines: an entry of `tiny_families` or a pipeline class."""
CHECKPOINTS = {
    "CHECKPOINT": ("MODEL", "convrot-w4a8"),
    "EXPORTED": ("MODEL", "convrot-w4a8"),
    "PAIR": ("TWO", "convrot-w4a8"),
    "shapes-w4a6": ("shapes-cogvideox", "rtn-w4a6"),
    "cogvideox-2b-w4a6": ("zai-org/CogVideoX-2b", "rtn-w4a6"),
    "runs/checkpoint": ("MODEL", "rtn-w4a8"),
}
"""Names of checkpoints that no command above them makes, with model and recipe."""
EXPORTS = {"SDNQ_FOLDER": "sdnq", "COMFYUI.safetensors": "comfyui"}
"""Names of exported files, with their format."""
MODEL_OPTIONS = ("-m", "--reference", "--base", "")
"""Options with a model; arguments have no option."""


def prepare(option: str, word: str) -> None:
    """Make what a word of a command names in the current folder, if the page leaves it to the reader."""
    if option == "--lora":
        _make_lora(word)
    elif option in ("--prompts", "--calibration-prompts"):
        _make_prompts(Path(word))
    elif option == "--lpips-weights":
        save_tiny_lpips(Path(word))
    elif option == "--clip":
        save_tiny_clip(Path(word))
    elif word.endswith(".yaml") and not option:
        Path(word).write_text("name: mine\nextends: rtn-w4a8\n")
    elif option in MODEL_OPTIONS:
        _make_model(word)


def _make_model(name: str) -> None:
    files, _, base = name.rpartition("@")
    if files:
        _make_model(base)
        for file in files.split(","):
            component, _, path = file.rpartition("=")
            transformer = getattr(s2q.load(base), component or "transformer")
            save_file({key: value.clone() for key, value in transformer.state_dict().items()}, path)
    elif Path(name).exists():
        return
    elif name in MODELS:
        tiny_pipeline(PIPELINES.get(MODELS[name], MODELS[name])).save_pretrained(name)
    elif name in CHECKPOINTS:
        model, recipe = CHECKPOINTS[name]
        _make_model(model)
        s2q.quantize(model, recipe=recipe, out=name)
    elif name in EXPORTS:
        _make_model("EXPORTED")
        s2q.export("EXPORTED", to=EXPORTS[name], out=name)


def _make_lora(text: str) -> None:
    """Save a random adapter of `FILE`, `FILE:SCALE` or `transformer_2=FILE:SCALE`."""
    from loras import save_lora  # imports peft

    component, _, path = text.partition(":")[0].rpartition("=")
    if Path(path).exists() and any("lora" in name for name in load_file(path)):
        return  # of the command above; a section of the page uses the names for transformers too
    file = save_lora(tiny_pipeline("wan 2.2 a14b"), Path("lora"), component=component or "transformer")
    file.replace(path)


def _make_prompts(path: Path) -> None:
    """Save a file of one prompt, with an image and videos where it may have them."""
    if path.suffix == ".jsonl":
        ((text, image),) = [(prompt["prompt"], prompt["image"]) for prompt in image_prompts("red")]
        image.save("image.png")
        frames = [Image.new("RGB", (40, 24), (8 * frame, 0, 0)) for frame in range(25)]
        frames[0].save("video.gif", save_all=True, append_images=frames[1:])
        videos = {} if path.stem == "images" else {"pose_video": "video.gif", "face_video": "video.gif"}
        path.write_text(json.dumps({"prompt": text, "image": "image.png"} | videos))
    else:
        path.write_text("red\n")


def inputs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the words of a command that are no options, each with the option before it, which may be none."""
    for option, word in zip(words, words[1:], strict=False):
        if not word.startswith("-"):
            yield (option if option.startswith("-") else ""), word


def unknown_names(words: Sequence[str], made: Collection[str]) -> list[str]:
    """Names of models and files in a command that are neither made by tests nor by the commands above it."""
    known = {*MODELS, *CHECKPOINTS, *EXPORTS, *EMBEDDED_NAMES, *made}
    names = []
    for option, word in inputs(words):
        name = word.rpartition("@")[2]
        is_recipe = option == "" and words[0] == "compare" and (word.endswith(".yaml") or match_recipes(word))
        if option in (*MODEL_OPTIONS, "--eval", "--videos") and not is_recipe and not name.startswith("synthetic:"):
            names += [name] if name not in known else []
    return names


def match_recipes(pattern: str) -> bool:
    """Whether a word of `s2q compare` matches recipes."""
    return any(fnmatch(name, pattern) for name in recipe_names())


def run(command: Command) -> int:
    """Run a command with its stand-ins in the current folder; return its exit code."""
    program, *words = command.runnable()
    for option, word in inputs(words):
        prepare(option, word)
    for output in _free_names(words):
        shutil.rmtree(output, ignore_errors=True)
        Path(output).unlink(missing_ok=True)
    return s2q_command(words) if program == "s2q" else reproduce(words[1:])


def _free_names(words: Sequence[str]) -> list[str]:
    """Outputs that sections of a page use for one thing after another: names in capitals, and the default of `eval`."""
    given = [word for option, word in zip(words, words[1:], strict=False) if option == "-o"]
    return [word for word in given if word.isupper()] + ["eval.json"] * (words[0] == "eval" and not given)
