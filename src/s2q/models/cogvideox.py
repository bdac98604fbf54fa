"""CogVideoX 2B, 5B and 1.5: joint attention over [text; video], adaLN by two linears a block."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from s2q.models.family import Family

_OFS = 2.0  # what diffusers' image-to-video pipeline passes


def _timestep_rows(transformer: Any, timesteps: Tensor) -> Tensor:
    """SiLU of the embedded timesteps [T], and of the constant that CogVideoX 1.5 I2V adds: [T, time_embed_dim]."""

    def embedded(projection: Any, embedding: Any, values: Tensor) -> Tensor:
        inside: Tensor = copy.deepcopy(embedding).to("cpu", torch.float32)(projection(values))
        return inside

    rows = embedded(transformer.time_proj, transformer.time_embedding, timesteps)
    if transformer.ofs_embedding is not None:
        rows = rows + embedded(transformer.ofs_proj, transformer.ofs_embedding, torch.full((1,), _OFS))
    return silu(rows)


COGVIDEOX = Family(
    name="cogvideox",
    transformer_class="CogVideoXTransformer3DModel",
    pipeline_class="CogVideoXPipeline",
    block_lists=("transformer_blocks",),
    modulation=("norm1.linear", "norm2.linear"),
    shared_inputs=(("attn1.to_q", "attn1.to_k", "attn1.to_v"),),
    text_linears=(),
    attention="attn1",
    streams=("hidden_states", "encoder_hidden_states"),
    joint_order=("encoder_hidden_states", "hidden_states"),
    latents="frames first",
    size_multiple=8,
    guidance="batched",
    text_tokens=226,
    defaults={"num_inference_steps": 50, "guidance_scale": 6.0},
    frame_rate=8,
    timestep_rows=_timestep_rows,
)
