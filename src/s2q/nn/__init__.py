"""Quantized linears, packed and trainable, and putting them into a model."""

from s2q.nn.clip import Clip, LearnableClip
from s2q.nn.estimator import Estimator
from s2q.nn.packed import PackedLinear
from s2q.nn.refined import RefinedLinear
from s2q.nn.runtime import set_backend, share_inputs
from s2q.nn.stored import PACKED_DTYPES
from s2q.nn.student import InputTransform, SplitInput, StudentInput, StudentLinear
from s2q.nn.swap import replace_module
from s2q.nn.token_context import follow_tokens, unfollow_tokens

__all__ = [
    "PACKED_DTYPES",
    "Clip",
    "Estimator",
    "InputTransform",
    "LearnableClip",
    "PackedLinear",
    "RefinedLinear",
    "SplitInput",
    "StudentInput",
    "StudentLinear",
    "follow_tokens",
    "replace_module",
    "set_backend",
    "share_inputs",
    "unfollow_tokens",
]
