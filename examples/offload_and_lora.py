"""Run a checkpoint in a diffusers script, with offloading and a LoRA.

    python examples/offload_and_lora.py [CHECKPOINT] [LORA.safetensors] [OUT.mp4]

Without CHECKPOINT, the embedded model is quantized first, in seconds. The adapter runs beside the packed codes. It
cannot be fused into them: to quantize a model with its LoRA, use `s2q quantize --lora`.
"""

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_video

import s2q  # from_pretrained knows s2q checkpoints once it is imported

PROMPT = "a red circle moving left on a grey background"
SETTINGS = {  # of the embedded model; published models need none of the sizes
    "num_inference_steps": 20,
    "height": 32,
    "width": 32,
    "num_frames": 9,
    "max_sequence_length": 16,
}


def main(checkpoint=None, lora=None, out="video.mp4", *, model="shapes-cogvideox", **settings):
    if checkpoint is None:
        checkpoint = Path(out).with_suffix("")
        if not checkpoint.is_dir():
            s2q.quantize(model, recipe="table-w4a8", out=checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(checkpoint)
    if lora is not None:
        pipe.load_lora_weights(lora, adapter_name="style")
        pipe.set_adapters(["style"], [0.8])
    pipe.enable_model_cpu_offload(device=device)  # each component is on the device only while it runs
    generator = torch.Generator().manual_seed(0)
    frames = pipe(PROMPT, generator=generator, **(SETTINGS | settings)).frames[0]
    export_to_video(frames, out, fps=8)
    return frames


if __name__ == "__main__":
    main(*sys.argv[1:])
