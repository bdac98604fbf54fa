"""LTX-Video: self-attention over the video, cross-attention to the text, no adaLN linears; latents in tokens."""

from s2q.models.family import Family, ImageToVideo

LTX = Family(
    name="ltx",
    transformer_class="LTXVideoTransformer3DModel",
    pipeline_class="LTXPipeline",
    image_to_video=ImageToVideo(pipeline_class="LTXImageToVideoPipeline", draws_noise=True),
    block_lists=("transformer_blocks",),
    modulation=(),
    shared_inputs=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
    text_linears=("attn2.to_k", "attn2.to_v"),
    attention="attn1",
    streams=("hidden_states",),
    joint_order=("hidden_states",),
    latents="tokens",
    size_multiple=32,
    guidance="batched",
    text_tokens=128,
    defaults={"num_frames": 161, "height": 512, "width": 704, "num_inference_steps": 50, "guidance_scale": 3.0},
    frame_rate=24,
    timestep_arguments=("sigmas", "mu"),
)
