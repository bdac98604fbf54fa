"""Commands of s2q in processes of their own, whose memory is theirs alone."""

import subprocess
import sys


def run_s2q(*arguments: str) -> str:
    """Run a command of s2q; return what it prints.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    command = [sys.executable, "-c", "from s2q.cli import main; main()", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
