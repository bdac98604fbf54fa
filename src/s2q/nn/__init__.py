"""Quantized linears, packed and trainable, and putting them into a model."""

from s2q.nn.activations import look_up_activations, restore_activations
from s2q.nn.attention import quantize_attention, restore_attention
from s2q.nn.clip import Clip, LearnableClip
from s2q.nn.encoder_linear import PACKED, EncoderLinear
from s2q.nn.input_path import Estimator, InputTransform, SplitInput, StudentInput
from s2q.nn.packed import PackedLinear
from s2q.nn.refined import RefinedLinear
from s2q.nn.runtime import set_backend
from s2q.nn.sharing import share_inputs
from s2q.nn.student import StudentLinear, StudentRows
from s2q.nn.swap import replace_module
from s2q.nn.token_context import follow_tokens, unfollow_tokens

__all__ = [
    "PACKED",
    "Clip",
    "EncoderLinear",
    "Estimator",
    "InputTransform",
    "LearnableClip",
    "PackedLinear",
    "RefinedLinear",
    "SplitInput",
    "StudentInput",
    "StudentLinear",
    "StudentRows",
    "follow_tokens",
    "look_up_activations",
    "quantize_attention",
    "replace_module",
    "restore_activations",
    "restore_attention",
    "set_backend",
    "share_inputs",
    "unfollow_tokens",
]
