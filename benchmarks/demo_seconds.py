"""Seconds of the stages of `s2q demo`, on this CPU and, where it has VNNI, on the same CPU limited to AVX2.

    python benchmarks/demo_seconds.py

Each is one whole run in a process of its own. Written to ``benchmarks/results/demo-seconds.json``; on a CPU without
VNNI, to ``demo-seconds-no-vnni.json``.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import environment
from records import rounded, write_record

from s2q.common.processor import has_int8_dot, limited_by

RESULTS = Path(__file__).parent / "results"
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def demo_seconds(variables: dict[str, str]) -> dict[str, float]:
    """Run the demo with these variables; return the seconds of its stages and of all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "s2q", "demo", "--no-open", "-o", f"{folder}/demo"]
        subprocess.run(command, env={**os.environ, **variables}, capture_output=True, check=True)
        seconds = json.loads((Path(folder) / "demo" / "demo.json").read_text())["seconds"]
    return {name: rounded(value) for name, value in seconds.items()}


def main() -> None:
    if limited_by():
        sys.exit(f"demo_seconds: this CPU is limited by {limited_by()}; unset it, the script sets its own")
    rows = []
    for variables in ({}, AVX2) if has_int8_dot() else ({},):
        rows.append({"variables": variables, "seconds": demo_seconds(variables)})
        print(json.dumps(rows[-1]), flush=True)
    file = "demo-seconds.json" if has_int8_dot() else "demo-seconds-no-vnni.json"
    write_record(RESULTS / file, {"schema_version": 1, **environment(), "rows": rows})


if __name__ == "__main__":
    main()
