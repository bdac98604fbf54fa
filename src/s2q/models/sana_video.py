"""Sana-Video: linear attention over the video, softmax attention to the text, convolutions as the feed-forward part.

The attention over the video has no softmax map. Token importance is that of the map which its denominators normalize,
φ(q) · φ(k) without positions (`distillation.token_importance`). The convolutions, 61 % of the parameters, stay in
full precision. Sizes are used as they are given: the pipeline's choice of the nearest known aspect ratio is off. Image
to video: the image is the first latent frame, whose tokens have the timestep 0.
"""

from s2q.models.family import Family, ImageToVideo

SANA_VIDEO = Family(
    name="sana-video",
    transformer_class="SanaVideoTransformer3DModel",
    pipeline_class="SanaVideoPipeline",
    image_to_video=ImageToVideo(pipeline_class="SanaImageToVideoPipeline"),
    block_lists=("transformer_blocks",),
    modulation=(),
    shared_inputs=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
    text_linears=("attn2.to_k", "attn2.to_v"),
    attention="attn1",
    linear_attention=True,
    streams=("hidden_states",),
    joint_order=("hidden_states",),
    latents="channels first",
    size_multiple=32,
    guidance="batched",
    text_tokens=300,
    call={"use_resolution_binning": False},
    frames_argument="frames",
    defaults={"num_frames": 81, "height": 480, "width": 832, "num_inference_steps": 50, "guidance_scale": 6.0},
    frame_rate=16,
)
