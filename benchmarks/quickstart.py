"""The commands of docs/quickstart.md as a new user types them: CPU seconds, and bytes that each writes.

    python benchmarks/quickstart.py --s2q PATH/TO/s2q

The program is that of an environment with nothing but the wheel and PyTorch. Commands run in an empty folder, in the
order of the page; pushes go to the stand-in of `tests/hub_server.py`. Written to
``benchmarks/results/quickstart.json``.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from environment import environment
from markdown_tables import table_head, table_row
from records import rounded, write_record

from s2q.report.formatting import format_bytes

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "quickstart.md"
RESULT = Path(__file__).parent / "results" / "quickstart.json"
NAMED = {"MODEL": "shapes-cogvideox", "OUT": "own", "s2q-table-w4a8": "s2q-w4a8"}
"""Words of the commands for a model of one's own, and what takes their place here."""
QUICK = ("--samples", "4", "--set", "distillation.epochs=1", "--set", "calibration.n_prompts=2")
"""Added to the calibration with prompts of one's own, which takes minutes otherwise."""
SERVERS = ("ui",)
"""Commands that run until they are stopped."""
PROMPTS = {
    "calibration.txt": "a red circle moving left on a grey background\na blue square moving up on a black background\n",
    "held-out.txt": "a green triangle moving right on a white background\n",
}


def commands(page: str) -> Iterator[list[str]]:
    """Yield the commands of s2q in the plain code blocks of a page, without comments."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE):
        for line in [] if language else block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["s2q"] and words[1] not in SERVERS:
                yield words[1:]


def runnable(words: Sequence[str]) -> list[str]:
    """Return a command with names in place of its placeholders; a calibration on own prompts is made short."""
    quick = QUICK if words[0] == "quantize" and "MODEL" in words else ()
    return [*(NAMED.get(word, word) for word in words), *quick]


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def run(program: Sequence[str], folder: Path, variables: dict[str, str]) -> list[dict[str, Any]]:
    """Run every command of the page in an empty folder; stop at the first that fails."""
    for name, text in PROMPTS.items():
        (folder / name).write_text(text)
    rows = []
    for words in commands(PAGE.read_text(encoding="utf-8")):
        before, used = size_of(folder), os.times()
        done = subprocess.run(
            [*program, *runnable(words)],
            cwd=folder,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"s2q {shlex.join(words)}: exit code {done.returncode}: {done.stderr.strip()}")
        now = os.times()
        seconds = now.children_user + now.children_system - used.children_user - used.children_system
        wall = now.elapsed - used.elapsed
        row = {"command": words, "ran": runnable(words), "cpu_seconds": rounded(seconds), "seconds": rounded(wall)}
        rows.append(row | {"bytes": size_of(folder) - before})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def measured() -> dict[str, Any]:
    """Return the results."""
    record: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return record


def quickstart_table(_: str) -> str:
    """CPU seconds and written bytes of each command of the quickstart."""
    record = measured()
    lines = table_head("command", ["CPU seconds", "writes"])
    for row in record["rows"]:
        written = format_bytes(row["bytes"]) if row["bytes"] else "nothing"
        name = f"`s2q {shlex.join(row['command'])}`" + (", short" if QUICK[0] in row["ran"] else "")
        lines.append(table_row(name, [f"{row['cpu_seconds']:.0f}", written]))
    hardware = record["hardware"]
    where = f"{hardware['processor']}, {hardware['cores']} cores, torch {record['versions']['torch']}"
    note = (
        f"User and system time of all processes, each command once, with the installed wheel ({where}).\n"
        "Five to six of them import PyTorch and diffusers. The machine had other work "
        f"(load {record['load']:.0f}), so wall-clock times are not given.\n"
        f"Short: `s2q-w4a8` with `{shlex.join(QUICK)}`. The Hub is a local stand-in.\n"
        "Made by `python benchmarks/quickstart.py --s2q PATH`."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--s2q", required=True, help="the program of the environment to measure")
    program = parser.parse_args().s2q
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_server import TOKEN, hub_server

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as home, hub_server() as (address, _):
        variables = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "",
            "HF_ENDPOINT": address,
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }
        rows = run([program], Path(folder), variables)
        where = environment() | {"command": "python benchmarks/quickstart.py --s2q PATH"}  # no path of this machine
        write_record(RESULT, {"schema_version": 1, **where, "load": os.getloadavg()[1], "rows": rows})


if __name__ == "__main__":
    main()
