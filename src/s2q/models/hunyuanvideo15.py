"""HunyuanVideo 1.5: blocks with two streams, joint attention over [video; text] with padding masked, adaLN by linears.

The text stream comes from three embedders outside the blocks, filled tokens before padding: 729 tokens of an image (all
padding in text to video), 256 of the words in quotation marks by ByT5, 1000 of the prompt. The channels of the latent
are the first ones that the transformer sees; those of an image and of a mask follow.
"""

from s2q.models.family import Family, ImageToVideo
from s2q.models.hunyuanvideo import HUNYUANVIDEO

HUNYUANVIDEO15 = Family(
    name="hunyuanvideo 1.5",
    transformer_class="HunyuanVideo15Transformer3DModel",
    pipeline_class="HunyuanVideo15Pipeline",
    image_to_video=ImageToVideo(
        pipeline_class="HunyuanVideo15ImageToVideoPipeline", takes_size=False, tokens=729, embedded_by="image_embed_dim"
    ),
    block_lists=("transformer_blocks",),
    modulation=("norm1.linear", "norm1_context.linear"),
    shared_inputs=HUNYUANVIDEO.shared_inputs,
    text_linears=HUNYUANVIDEO.text_linears,
    attention="attn",
    streams=("hidden_states", "encoder_hidden_states"),
    joint_order=("hidden_states", "encoder_hidden_states"),
    latents="channels first",
    size_multiple=16,
    guidance="guider",
    text_tokens=995,  # 1000, of which the chat template takes 5 behind the prompt
    decodes_batches=False,  # https://github.com/huggingface/diffusers/pull/13133
    defaults={"num_frames": 121, "height": 480, "width": 848, "num_inference_steps": 50, "guidance_scale": 6.0},
    frame_rate=24,
    timestep_arguments=("sigmas",),
)
