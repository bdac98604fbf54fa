"""Floor 2: quantized linears, packed and trainable, and putting them into a model."""

from s2q.nn.clip import LearnableClip
from s2q.nn.packed import PackedLinear
from s2q.nn.student import InputTransform, StudentInput, StudentLinear
from s2q.nn.swap import replace_module

__all__ = [
    "InputTransform",
    "LearnableClip",
    "PackedLinear",
    "StudentInput",
    "StudentLinear",
    "replace_module",
]
