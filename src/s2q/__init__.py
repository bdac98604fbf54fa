"""s2q: 4-bit quantization of text-to-video diffusion transformers in diffusers, close to full-precision quality.

    import s2q
    s2q.quantize("shapes-cogvideox", recipe="rtn-w4a6", out="shapes-w4a6")
    pipe = CogVideoXPipeline.from_pretrained("shapes-w4a6")   # works once s2q is imported
    videos = s2q.generate("shapes-w4a6", prompts=["a red circle moving left on a grey background"])
    scores = s2q.evaluate("shapes-w4a6", reference="shapes-cogvideox", num_inference_steps=8)

The verbs are those of the command line, and their keywords its flags; each is loaded when it is first used. Importing
the package only registers s2q checkpoints with diffusers and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from s2q import _hook

if TYPE_CHECKING:
    from s2q.benchmark.bench import bench
    from s2q.comparison.compare import compare
    from s2q.evaluation.evaluate import evaluate
    from s2q.exports.convert import convert
    from s2q.exports.export import export
    from s2q.exports.push import push
    from s2q.generation.generate import generate
    from s2q.generation.load import inspect_model as inspect
    from s2q.generation.load import load_pipeline as load
    from s2q.planning import plan
    from s2q.run.quantize import quantize
    from s2q.run.while_loading import Config

__all__ = [
    "Config",
    "__version__",
    "bench",
    "compare",
    "convert",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "plan",
    "push",
    "quantize",
]

_LAZY = {
    "Config": ("s2q.run.while_loading", "Config"),
    "bench": ("s2q.benchmark.bench", "bench"),
    "compare": ("s2q.comparison.compare", "compare"),
    "convert": ("s2q.exports.convert", "convert"),
    "evaluate": ("s2q.evaluation.evaluate", "evaluate"),
    "export": ("s2q.exports.export", "export"),
    "generate": ("s2q.generation.generate", "generate"),
    "inspect": ("s2q.generation.load", "inspect_model"),
    "load": ("s2q.generation.load", "load_pipeline"),
    "plan": ("s2q.planning", "plan"),
    "push": ("s2q.exports.push", "push"),
    "quantize": ("s2q.run.quantize", "quantize"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("s2q")
    if name not in _LAZY:
        raise AttributeError(f"module 's2q' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _LAZY[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_hook.register_with_libraries()
