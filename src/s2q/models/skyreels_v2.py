"""SkyReels-V2: Wan's blocks in a transformer class and a pipeline of their own."""

from dataclasses import replace

from s2q.models.wan import WAN

SKYREELS_V2 = replace(
    WAN,
    name="skyreels-v2",
    transformer_class="SkyReelsV2Transformer3DModel",
    pipeline_class="SkyReelsV2Pipeline",
    image_to_video=None,
    defaults={"num_frames": 97, "height": 544, "width": 960, "num_inference_steps": 50, "guidance_scale": 6.0},
    frame_rate=24,
)
