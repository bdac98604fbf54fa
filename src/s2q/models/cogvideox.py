"""CogVideoX 2B, 5B and 1.5: joint attention over [text; video], adaLN by two linears a block."""

from s2q.models.family import Family, ImageToVideo

COGVIDEOX = Family(
    name="cogvideox",
    transformer_class="CogVideoXTransformer3DModel",
    pipeline_class="CogVideoXPipeline",
    image_to_video=ImageToVideo(pipeline_class="CogVideoXImageToVideoPipeline"),
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
    timestep_embeddings=(
        ("time_proj", "time_embedding", None),
        ("ofs_proj", "ofs_embedding", 2.0),  # of CogVideoX 1.5 image-to-video; what diffusers' pipeline passes
    ),
)
