"""Kandinsky 5: self-attention over the video, cross-attention to the text, adaLN by linears; channels-last latents.

The text runs through blocks of its own first, which are outside the quantized list, as a token refiner is. The two
branches of guidance have texts of different lengths, without a mask, so one call cannot have both: calibration and the
velocity error see the conditional branch. Behind the channels of the latent come those of an image and of a mask. Image
to video: the image starts the first latent frame, and the pipeline adapts the first four to those behind them.
"""

from s2q.models.family import Family, ImageToVideo

KANDINSKY5 = Family(
    name="kandinsky5",
    transformer_class="Kandinsky5Transformer3DModel",
    pipeline_class="Kandinsky5T2VPipeline",
    image_to_video=ImageToVideo(pipeline_class="Kandinsky5I2VPipeline", draws_noise=True, least_frames=17),
    block_lists=("visual_transformer_blocks",),
    modulation=("visual_modulation.out_layer",),
    shared_inputs=(
        ("self_attention.to_query", "self_attention.to_key", "self_attention.to_value"),
        ("cross_attention.to_key", "cross_attention.to_value"),
    ),
    text_linears=("cross_attention.to_key", "cross_attention.to_value"),
    attention="self_attention",
    streams=("visual_embed",),
    block_arguments={"hidden_states": "visual_embed", "encoder_hidden_states": "text_embed"},
    joint_order=("visual_embed",),
    latents="channels last",
    size_multiple=16,
    guidance="apart",
    text_tokens=512,
    unbatched=("text_rope_pos",),
    draws_noise=True,
    defaults={"num_frames": 121, "height": 512, "width": 768, "num_inference_steps": 50, "guidance_scale": 5.0},
    frame_rate=24,
    latent_linears=("visual_embeddings.in_layer", "out_layer.out_layer"),
)
