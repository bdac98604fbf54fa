"""Attention backends of a transformer, from diffusers' registry, for every family.

diffusers lets a model choose by name ("native", "flash", "sage" in int8, and others) where its attention processor asks
the registry. CogVideoX's own processor does not; `DispatchedCogVideoXAttention` does, and is otherwise the same.

Shapes: `B` samples, `T` text tokens, `N` video tokens, `H` heads, `D` head dim.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from s2q.common.errors import ResourceError, first_line, unknown_name


class DispatchedCogVideoXAttention:
    """Joint attention of CogVideoX over [text; video], through diffusers' registry of attention backends.

    diffusers sets `_attention_backend` (`transformer.set_attention_backend`) and `_parallel_config`.
    """

    def __init__(self) -> None:
        self._attention_backend: Any = None
        self._parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend: video [B, N, H · D] and text [B, T, H · D] in and out; the rotary embedding is [N, D] twice."""
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            project(joint).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                torch.cat([heads[:, :text], apply_rotary_emb(heads[:, text:], image_rotary_emb, sequence_dim=1)], dim=1)
                for heads in (query, key)
            )
        if attention_mask is not None:
            samples, tokens = joint.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, samples)
            attention_mask = attention_mask.view(samples, attn.heads, -1, tokens)
        output = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2)
        for module in attn.to_out:
            output = module(output)
        return output[:, text:], output[:, :text]


def use_attention_registry(model: nn.Module) -> None:
    """Let `set_attention_backend` reach every attention of a model or a part of one, in place."""
    for module in model.modules():
        if isinstance(module, Attention) and type(module.processor) is CogVideoXAttnProcessor2_0:
            module.set_processor(DispatchedCogVideoXAttention())


def check_attention_backend(name: str) -> None:
    """Check that an attention backend of diffusers ("native", "flash", "sage" …) exists and can run here."""
    with attention_of(name):
        pass


@contextlib.contextmanager
def attention_of(name: str | None) -> Iterator[None]:
    """Run with an attention backend where a model has not chosen one itself; None changes nothing."""
    if name is None:
        yield
        return
    names = [backend.value for backend in AttentionBackendName]
    if name not in names:
        raise unknown_name("attention backend", name, names)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(attention_backend(name))
        except (ImportError, RuntimeError, ValueError) as error:
            raise ResourceError(f"attention backend {name!r} cannot run here: {first_line(error)}") from error
        yield
