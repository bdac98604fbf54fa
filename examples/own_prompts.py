"""Quantize a pipeline with your own calibration prompts, and evaluate it on other ones.

    python examples/own_prompts.py [MODEL] [OUT]

The prompts that calibrate should look like those that you will generate. With the embedded model this takes minutes on
a CPU; `recipe="table-w4a8"` needs no calibration and takes seconds.
"""

import sys

import s2q

CALIBRATION = [
    "a red circle moving left on a grey background",
    "a blue square moving up on a black background",
    "a green triangle standing still on a white background",
    "a yellow cross moving right on a grey background",
]
EVALUATION = [
    "a blue circle moving right on a black background",
    "a red triangle moving down on a white background",
]


def main(model="shapes-cogvideox", out="own-prompts", *, recipe="s2q-table-w4a8", samples=16, steps=8):
    planned = s2q.plan(model, recipe=recipe)
    print(f"{recipe}: {planned.storage['ratio']:.2f} times smaller than bf16")
    s2q.quantize(model, recipe=recipe, out=out, prompts=CALIBRATION, samples=samples)
    scores = s2q.evaluate(out, reference=model, prompts=EVALUATION, seeds=[0], num_inference_steps=steps)
    for name in ("psnr_frame_mean_db", "velocity_relative_error"):
        print(f"{name}: {scores['metrics'][name]['mean']:.4g}")
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:])
