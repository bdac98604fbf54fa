"""HunyuanVideo: blocks with two streams, then blocks with one; joint attention over [video; text], adaLN by linears.

The first 20 blocks treat video and text with weights of their own; the other 40 see them as one sequence. Guidance is
distilled: one call a step, with the guidance weight as an input. The token refiner of the text lies outside the blocks.
"""

from s2q.models.family import Family

HUNYUANVIDEO = Family(
    name="hunyuanvideo",
    transformer_class="HunyuanVideoTransformer3DModel",
    pipeline_class="HunyuanVideoPipeline",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    modulation=("norm1.linear", "norm1_context.linear", "norm.linear"),
    shared_inputs=(("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    text_linears=(
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
    attention="attn",
    streams=("hidden_states", "encoder_hidden_states"),
    joint_order=("hidden_states", "encoder_hidden_states"),
    latents="channels first",
    size_multiple=16,
    guidance="embedded",
    text_tokens=256,
    defaults={"num_frames": 129, "height": 720, "width": 1280, "num_inference_steps": 50, "guidance_scale": 6.0},
    frame_rate=15,
    timestep_arguments=("sigmas",),
)
