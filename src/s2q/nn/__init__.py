"""Floor 2: quantized linears, packed and trainable, and putting them into a model."""

from s2q.nn.clip import LearnableClip
from s2q.nn.estimator import Estimator
from s2q.nn.packed import PACKED_DTYPES, PackedLinear
from s2q.nn.refined import RefinedLinear
from s2q.nn.runtime import set_backend, share_inputs
from s2q.nn.student import InputTransform, SplitInput, StudentInput, StudentLinear
from s2q.nn.swap import replace_module
from s2q.nn.token_context import TokenContext, follow_tokens, set_token_grid, unfollow_tokens

__all__ = [
    "PACKED_DTYPES",
    "Estimator",
    "InputTransform",
    "LearnableClip",
    "PackedLinear",
    "RefinedLinear",
    "SplitInput",
    "StudentInput",
    "StudentLinear",
    "TokenContext",
    "follow_tokens",
    "replace_module",
    "set_backend",
    "set_token_grid",
    "share_inputs",
    "unfollow_tokens",
]
