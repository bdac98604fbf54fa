"""MiniMax-H3: text, sound and video are one sequence that every block attends to as a whole.

diffusers has a modular pipeline of it only, whose steps s2q runs (`s2q.pipelines.minimax_h3`): text to video with
sound. The same transformer makes videos of a first or last frame. The transformer for references (`transformer_ref`) is
not quantized. The sequence is [text | sound | video]. A call lists the timesteps of its tokens, 0 for noise and 1 for
clean, and which token has which; video and sound have schedules of their own. adaLN linears read one row a timestep.
"""

from s2q.models.family import Family, FrameGroups

MINIMAX_H3 = Family(
    name="minimax-h3",
    transformer_class="MiniMaxH3Transformer3DModel",
    pipeline_class="MiniMaxH3Pipeline",
    block_lists=("transformer_blocks",),
    modulation=("adaln_proj.linear",),
    shared_inputs=(("attn.to_q", "attn.to_k", "attn.to_v"),),
    text_linears=(),
    attention="attn",
    streams=("hidden_states",),
    joint_order=("hidden_states",),
    latents="packed",
    frame_groups=FrameGroups(frames=17, latents=5, first_frames=5, first_latents=2, least=124, most=345),
    size_multiple=32,
    guidance="embedded",
    text_tokens=512,
    takes_batches=False,
    draws_noise=True,
    unbatched=(
        *("timestep", "timestep_indices", "token_tags", "position_ids"),
        *("video_indices", "audio_indices", "text_indices"),
    ),
    defaults={"num_frames": 124, "height": 768, "width": 1344, "num_inference_steps": 49, "guidance_scale": 1.0},
    frame_rate=24,
    latent_linears=("proj_in", "proj_out", "audio_proj_in", "audio_proj_out"),
)
