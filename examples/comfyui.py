"""Quantize a Wan pipeline and write it as one file that ComfyUI loads.

    python examples/comfyui.py [MODEL] [OUT.safetensors]

Put the file into ComfyUI/models/diffusion_models and choose it in the node "Load Diffusion Model". Text encoder and
autoencoder are those that you already have. `s2q-export-table-w4a8` is more accurate and calibrates; `convrot-w4a8`
takes seconds. The default model shows the export only: ComfyUI runs Wan with 128 channels per attention head.
"""

import sys
from pathlib import Path

import s2q


def main(model="shapes-wan", out="shapes-wan-w4a8.safetensors", *, recipe="convrot-w4a8"):
    checkpoint = Path(out).with_suffix("")
    s2q.quantize(model, recipe=recipe, out=checkpoint)
    report = s2q.export(checkpoint, to="comfyui", out=out)
    print(f"{out}: {report.storage['ratio']:.2f} times smaller than bf16, {report.linears}")
    return report


if __name__ == "__main__":
    main(*sys.argv[1:])
