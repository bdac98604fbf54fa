"""Compare a checkpoint of another tool with a recipe, on the same prompts and noise.

    python examples/other_tool.py [MODEL] [THEIRS] [OUT]

THEIRS is a folder or Hub id of SDNQ, or a .safetensors of ComfyUI. `s2q convert` repacks its codes, so both sides run
on the same kernels. Without THEIRS, a checkpoint in SDNQ's format is written first, rounded to nearest.
"""

import sys
from pathlib import Path

import s2q


def main(model="shapes-cogvideox", theirs=None, out="other-tool", *, recipe="s2q-export-w4a8", **options):
    folder = Path(out)
    if theirs is None:
        s2q.quantize(model, recipe="convrot-w4a8", out=folder / "plain")
        s2q.export(folder / "plain", to="sdnq", out=folder / "sdnq")
        theirs = folder / "sdnq"
    s2q.convert(theirs, out=folder / "theirs", base=model)
    compared = s2q.compare([recipe, str(folder / "theirs")], model=model, out=folder / "compared", **options)
    for entry in compared["entries"]:
        failed, error = entry["error"], entry["metrics"].get("velocity_relative_error")
        print(f"{entry['label']}: {failed or format(error['mean'], '.3g')}")
    return compared


if __name__ == "__main__":
    main(*sys.argv[1:])
