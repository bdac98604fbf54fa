"""LTX-2 and 2.3: a stream of the video and one of its sound, which attend to themselves, to the text and to each other.

There are no adaLN linears. 2.3 adds a modulation of the text and gates of the heads (`to_gate_logits`), one row a head.
Token importance is that of the video's self-attention; every audio token has the weight 1. The pipeline's two further
passes of guidance, without self-attention in some blocks and without attention between the streams, are switched off:
calibration and evaluation run classifier-free guidance with one weight for both streams (the pipeline's default for the
sound is 7), rescaled by the pipeline's default of 0.7 towards the deviation of the conditional branch. The defaults are
those of 2.3; LTX-2 19B is published with 40 steps and a weight of 4.

Image to video: the image is the first latent frame, whose tokens have the timestep 0. The pipeline compresses it by
H.264 before it encodes it, as in training, for which it needs PyAV.
"""

from s2q.models.family import Family, ImageToVideo

LTX2 = Family(
    name="ltx-2",
    transformer_class="LTX2VideoTransformer3DModel",
    pipeline_class="LTX2Pipeline",
    image_to_video=ImageToVideo(pipeline_class="LTX2ImageToVideoPipeline", draws_noise=True, packages=("av",)),
    block_lists=("transformer_blocks",),
    modulation=(),
    shared_inputs=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("audio_attn1.to_q", "audio_attn1.to_k", "audio_attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),
        ("audio_attn2.to_k", "audio_attn2.to_v"),
        ("audio_to_video_attn.to_k", "audio_to_video_attn.to_v"),
        ("video_to_audio_attn.to_k", "video_to_audio_attn.to_v"),
    ),
    text_linears=("attn2.to_k", "attn2.to_v", "audio_attn2.to_k", "audio_attn2.to_v"),
    audio_linears=(
        *("audio_attn1.to_q", "audio_attn1.to_k", "audio_attn1.to_v", "audio_attn1.to_out.0"),
        *("audio_attn2.to_q", "audio_attn2.to_out.0", "video_to_audio_attn.to_q", "video_to_audio_attn.to_out.0"),
        *("audio_to_video_attn.to_k", "audio_to_video_attn.to_v", "audio_ff.net.0.proj", "audio_ff.net.2"),
    ),
    attention="attn1",
    streams=("hidden_states", "audio_hidden_states"),
    joint_order=("hidden_states",),
    latents="tokens",
    size_multiple=32,
    guidance="batched",
    text_tokens=1024,
    call={
        "stg_scale": 0.0,
        "audio_stg_scale": None,
        "modality_scale": 1.0,
        "audio_modality_scale": None,
        "audio_guidance_scale": None,
    },
    draws_noise=True,
    kept_linears=(
        *("attn1.to_gate_logits", "attn2.to_gate_logits", "audio_to_video_attn.to_gate_logits"),
        *("audio_attn1.to_gate_logits", "audio_attn2.to_gate_logits", "video_to_audio_attn.to_gate_logits"),
    ),
    defaults={"num_frames": 121, "height": 512, "width": 768, "num_inference_steps": 30, "guidance_scale": 3.0},
    frame_rate=24,
    timestep_arguments=("sigmas", "mu"),
    latent_linears=("proj_in", "proj_out", "audio_proj_in", "audio_proj_out"),
    original_names=((r"^(audio_)?prompt_adaln_single\.", r"\1prompt_adaln."),),  # of 2.3
)
