"""Registering s2q checkpoints with diffusers and transformers, without importing these before somebody wants them.

diffusers finds quantizers in two dicts of `diffusers.quantizers.auto` and has no entry point for more. If that module
is loaded, the dicts are written at once; else a finder waits for its import, or for that of `s2q.checkpoint` (which
imports it, and must be complete before it can be registered), lets the ordinary finders do their work, writes the
dicts, and is gone. So `import s2q` costs milliseconds, and the order of the imports does not matter. Text encoders are
loaded by transformers, which has two such dicts of its own; what is written there imports s2q when it is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_DICTS = "diffusers.quantizers.auto"
_ENCODER_DICTS = "transformers.quantizers.auto"
_CHECKPOINT = "s2q.checkpoint"
_METHOD = "s2q"


def register_with_libraries() -> None:
    """Make `from_pretrained` of diffusers and transformers know s2q checkpoints, now or once these are imported."""
    for names, register in (((_DICTS, _CHECKPOINT), _register), ((_ENCODER_DICTS,), _register_encoders)):
        if names[0] in sys.modules:
            register()
        elif not any(isinstance(finder, _Finder) and finder.names == names for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(names, register))


def _register_encoders() -> None:
    dicts = sys.modules[_ENCODER_DICTS]
    dicts.AUTO_QUANTIZER_MAPPING[_METHOD] = _encoder_quantizer
    dicts.AUTO_QUANTIZATION_CONFIG_MAPPING[_METHOD] = _EncoderConfig


def _encoder_quantizer(config: Any, **kwargs: Any) -> Any:
    return importlib.import_module("s2q.checkpoint.text_encoders").StoredEncoderQuantizer(config, **kwargs)


class _EncoderConfig:
    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Any:
        return importlib.import_module("s2q.checkpoint.config").S2QConfig.from_dict(dict(fields))


def _register() -> None:
    checkpoint = importlib.import_module("s2q.checkpoint")
    if hasattr(checkpoint, "register"):  # else it is being imported just now, and registers itself at its end
        checkpoint.register()


class _Finder(MetaPathFinder):
    """Waits for one of some modules and steps aside; calls `register` once that is imported."""

    def __init__(self, names: tuple[str, ...], register: Callable[[], None]) -> None:
        self.names, self._register = names, register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._register)
        return spec


class _Loader(Loader):
    """Loads a module as `loader` would, and registers afterwards."""

    def __init__(self, loader: Loader, register: Callable[[], None]) -> None:
        self._loader, self._register = loader, register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._register()
