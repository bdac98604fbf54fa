"""Counts of the long fault suite (`make test-faults`), a section per kind of fault, in results/reliability.json."""

import fcntl
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from environment import environment

from s2q.common.files import atomic_write_json

RESULTS = Path(__file__).parent / "results" / "reliability.json"
COMMAND = "make test-faults"


def record(section: str, counts: Mapping[str, Any], *, results: Path = RESULTS, command: str = COMMAND) -> None:
    """Replace a section of the results file, with hardware, versions, command and date; several processes may call."""
    described = {**environment(), "command": command, "date": datetime.now(UTC).date().isoformat()}
    folder = os.open(results.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        content = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
        atomic_write_json(results, {**content, section: {"counts": dict(counts), **described}})
    finally:
        os.close(folder)
