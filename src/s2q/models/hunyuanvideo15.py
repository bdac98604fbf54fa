"""HunyuanVideo 1.5: blocks with two streams, joint attention over [video; text] with padding masked, adaLN by linears.

The text stream comes from three embedders outside the blocks, filled tokens before padding: 729 tokens of an image (all
padding in text to video), 256 of the words in quotation marks by ByT5, 1000 of the prompt. The channels of the latent
are the first ones that the transformer sees; those of an image and of a mask follow.
"""

from s2q.models.family import Family

HUNYUANVIDEO15 = Family(
    name="hunyuanvideo 1.5",
    transformer_class="HunyuanVideo15Transformer3DModel",
    pipeline_class="HunyuanVideo15Pipeline",
    block_lists=("transformer_blocks",),
    modulation=("norm1.linear", "norm1_context.linear"),
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
    guidance="guider",
    text_tokens=995,  # 1000, of which the chat template takes 5 behind the prompt
    decodes_batches=False,  # https://github.com/huggingface/diffusers/pull/13133
    defaults={"num_frames": 121, "height": 480, "width": 848, "num_inference_steps": 50, "guidance_scale": 6.0},
    frame_rate=24,
)
