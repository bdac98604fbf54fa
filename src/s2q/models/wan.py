"""Wan 2.1, 1.3B and 14B, and 2.2, 5B and A14B: self-attention over the video, cross-attention to the text.

There are no adaLN linears: a block's modulation is a table of its own plus what one linear outside the blocks makes of
the timestep. Image to video of 2.1 has keys and values of the image's tokens too in its cross-attention. A14B has two
transformers of this class, which share the timesteps.
"""

from s2q.models.family import Family, ImageToVideo

WAN = Family(
    name="wan",
    transformer_class="WanTransformer3DModel",
    pipeline_class="WanPipeline",
    image_to_video=ImageToVideo(
        pipeline_class="WanImageToVideoPipeline", tokens=257, embedded_by="image_dim", packages=("ftfy",)
    ),
    block_lists=("blocks",),
    modulation=(),
    shared_inputs=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),
        ("attn2.add_k_proj", "attn2.add_v_proj"),
    ),
    text_linears=("attn2.to_k", "attn2.to_v", "attn2.add_k_proj", "attn2.add_v_proj"),
    image_linears=("attn2.add_k_proj", "attn2.add_v_proj"),
    attention="attn1",
    streams=("hidden_states",),
    joint_order=("hidden_states",),
    latents="channels first",
    size_multiple=16,
    guidance="two calls",
    text_tokens=512,
    defaults={"num_frames": 81, "height": 480, "width": 832, "num_inference_steps": 50, "guidance_scale": 5.0},
    frame_rate=16,
)
