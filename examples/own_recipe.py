"""Write your own recipe and compare it with the one that it extends.

    python examples/own_recipe.py [MODEL] [OUT]

The page OUT/index.html shows the videos side by side. A winner is named from 10 prompts on.
"""

import sys
from pathlib import Path

import s2q

RECIPE = Path(__file__).with_name("own_recipe.yaml")


def main(model="shapes-cogvideox", out="own-recipe", *, base="s2q-w4a8", **options):
    compared = s2q.compare([str(RECIPE), base], model=model, out=out, **options)
    for entry in compared["entries"]:
        failed, error = entry["error"], entry["metrics"].get("velocity_relative_error")
        print(f"{entry['label']}: {failed or format(error['mean'], '.3g')}")
    return compared


if __name__ == "__main__":
    main(*sys.argv[1:])
