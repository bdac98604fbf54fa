"""Seconds of the stages of `s2q demo`, on this CPU and on the same CPU limited to AVX2.

    python benchmarks/demo_seconds.py

Each is one whole run in a process of its own. Written to ``benchmarks/results/demo-seconds.json``.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import environment
from records import rounded, write_record

RESULT = Path(__file__).parent / "results" / "demo-seconds.json"
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def demo_seconds(variables: dict[str, str]) -> dict[str, float]:
    """Run the demo with these variables; return the seconds of its stages and of all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "s2q", "demo", "--no-open", "-o", f"{folder}/demo"]
        subprocess.run(command, env={**os.environ, **variables}, capture_output=True, check=True)
        seconds = json.loads((Path(folder) / "demo" / "demo.json").read_text())["seconds"]
    return {name: rounded(value) for name, value in seconds.items()}


def main() -> None:
    rows = []
    for name, variables in (("all", {}), ("AVX2 alone", AVX2)):
        rows.append({"instructions": name, "variables": variables, "seconds": demo_seconds(variables)})
        print(json.dumps(rows[-1]), flush=True)
    write_record(RESULT, {"schema_version": 1, **environment(), "rows": rows})


if __name__ == "__main__":
    main()
