"""Mochi 1: joint attention over [video; text] in streams of two widths, adaLN by linears, linears without biases.

Text tokens that a prompt does not fill are left out of the attention, sample by sample. The last block returns the text
as it got it.
"""

from s2q.models.family import Family

MOCHI = Family(
    name="mochi",
    transformer_class="MochiTransformer3DModel",
    pipeline_class="MochiPipeline",
    block_lists=("transformer_blocks",),
    modulation=("norm1.linear", "norm1_context.linear", "norm1_context.linear_1"),
    shared_inputs=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
    ),
    text_linears=(
        "attn1.add_q_proj",
        "attn1.add_k_proj",
        "attn1.add_v_proj",
        "attn1.to_add_out",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
    attention="attn1",
    streams=("hidden_states", "encoder_hidden_states"),
    joint_order=("hidden_states", "encoder_hidden_states"),
    latents="channels first",
    size_multiple=8,
    guidance="batched",
    text_tokens=256,
    defaults={"num_frames": 85, "height": 480, "width": 848, "num_inference_steps": 64, "guidance_scale": 4.5},
    frame_rate=30,
    timestep_arguments=("sigmas",),
)
