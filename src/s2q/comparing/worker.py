"""A worker process: `python -m s2q.comparing.worker DIR DEVICE` evaluates the shards that it is told to.

It reads a JSON object a line, `{"index": 3, "labels": ["rtn-w4a6"]}`, and answers with lines: `{"stepped": 1}` after
every step, `{"failed": LABEL, "why": TEXT}`, and in the end `{"done": 3}` or `{"error": NAME, "why": TEXT}`. The end of
its input ends it. Whatever libraries print goes to its standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

from s2q.comparing.folder import CompareFolder
from s2q.comparing.shards import Reports, Shard, evaluate_shard
from s2q.core.errors import S2QError


def serve(folder: CompareFolder, device: str, *, orders: TextIO, answers: TextIO) -> None:
    """Evaluate shards until there are no more orders.

    Args:
        folder: The comparison.
        device: Where to compute.
        orders: Lines that say what to do.
        answers: Where to report.
    """

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    reports = Reports(stepped=lambda: answer(stepped=1), failed=lambda label, why: answer(failed=label, why=why))
    plan = folder.plan()
    for line in orders:
        order = json.loads(line)
        shard = Shard(index=order["index"], labels=tuple(order["labels"]))
        try:
            evaluate_shard(folder, plan, shard, device=device, reports=reports)
        except S2QError as error:
            answer(error=type(error).__name__, why=str(error))
        else:
            answer(done=shard.index)


def main() -> None:
    """Serve on standard input and output."""
    folder, device = sys.argv[1:]
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        if device == "cpu":
            torch.set_num_threads(1)
        else:  # Triton kernels of attention backends run on the current device
            torch.cuda.set_device(device)
        serve(CompareFolder(Path(folder)), device, orders=sys.stdin, answers=answers)


if __name__ == "__main__":
    main()
