"""`python benchmarks/reproduce TABLE …`; what it does is in `command.py`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # what the scripts of benchmarks share lies there

from reproduce.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
