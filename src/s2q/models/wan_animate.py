"""Wan 2.2 Animate: Wan's blocks; the character of an image takes the poses and expressions of two videos.

A latent frame in front of those of the video has the image, and the latents of the poses are added to the tokens of the
video. Behind every fifth block, attention to the face's motion is added: these layers are outside the blocks. With a
background and a mask beside the poses and the face, the pipeline replaces the character of a video. Calibration,
`generate` and `eval` make one segment of `num_frames` frames. Published without guidance.
"""

from dataclasses import replace

from s2q.models.family import ImageToVideo
from s2q.models.wan import WAN

WAN_ANIMATE = replace(
    WAN,
    name="wan-animate",
    transformer_class="WanAnimateTransformer3DModel",
    pipeline_class="WanAnimatePipeline",
    image_to_video=ImageToVideo(
        pipeline_class="WanAnimatePipeline",
        tokens=257,
        embedded_by="image_dim",
        packages=("ftfy",),
        starts_video=False,
        videos=("pose_video", "face_video"),
        further_videos=("background_video", "mask_video"),
        further_call={"mode": "replace"},
        least_frames=5,
    ),
    frames_argument="segment_frame_length",
    reference_frames=1,
    chained=False,
    defaults={"num_frames": 77, "height": 720, "width": 1280, "num_inference_steps": 20, "guidance_scale": 1.0},
    frame_rate=30,
)
