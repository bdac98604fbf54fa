import os

import pytest


@pytest.fixture
def disk_log(monkeypatch):
    """The paths given to fsync and the targets of renames, in order."""
    log = []

    def record(name):
        function = getattr(os, name)

        def call(*args):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[1])
            log.append((name, path))
            return function(*args)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "rename", "replace"):
        record(name)
    return log
