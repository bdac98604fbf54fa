"""Registering s2q checkpoints with diffusers, without importing diffusers before somebody wants it.

diffusers finds quantizers in two dicts of `diffusers.quantizers.auto` and has no entry point for more. If that module
is loaded, the dicts are written at once; else a finder waits for its import, or for that of `s2q.checkpoint` (which
imports it, and must be complete before it can be registered), lets the ordinary finders do their work, writes the
dicts, and is gone. So `import s2q` costs milliseconds, and the order of the imports does not matter.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_DICTS = "diffusers.quantizers.auto"
_CHECKPOINT = "s2q.checkpoint"


def register_with_diffusers() -> None:
    """Make diffusers' `from_pretrained` know s2q checkpoints, now or once diffusers is imported."""
    if _DICTS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    checkpoint = importlib.import_module("s2q.checkpoint")
    if hasattr(checkpoint, "register"):  # else it is being imported just now, and registers itself at its end
        checkpoint.register()


class _Finder(MetaPathFinder):
    """Waits for one of the two modules and steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (_DICTS, _CHECKPOINT):
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a module as `loader` would, and registers afterwards."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
