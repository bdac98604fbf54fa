"""Wan VACE: Wan's blocks, and blocks of a control stream whose hints are added to the output of some of them.

The blocks of the control stream run first, on the latents, the control latents and the text; each returns its hint and
the control stream. Without a control video, a mask or a reference image, the pipeline runs text to video, which is what
calibration, `generate` and `eval` do. It takes one prompt.
"""

from dataclasses import replace

from s2q.models.wan import WAN

WAN_VACE = replace(
    WAN,
    name="wan-vace",
    transformer_class="WanVACETransformer3DModel",
    pipeline_class="WanVACEPipeline",
    image_to_video=None,
    block_lists=("vace_blocks", "blocks"),
    list_streams={"vace_blocks": ("hidden_states", "control_hidden_states")},
    chained=False,
    unbatched=("control_hidden_states_scale",),
    takes_batches=False,
)
