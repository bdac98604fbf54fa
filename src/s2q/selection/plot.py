"""A picture of the selection: the scores of all candidates, the chosen ones marked."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

SCORES = {
    "diffusion_salience": "diffusion salience",
    "quantization_salience": "quantization salience",
    "salience": "their product",
}
"""Scores of a candidate in `selection.json`, from 0 to 1, with their titles."""


def selection_plot(record: Mapping[str, Any]) -> bytes:
    """Draw the three scores over prompts × timesteps, the chosen candidates marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(record["prompts"])
    columns = 1 + max(candidate["step"] for candidate in record["candidates"])
    figure = Figure(figsize=(min(16.0, 3 + 0.2 * columns), 1.5 + 3 * (0.6 + 0.16 * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(SCORES), 1, squeeze=False, sharex=True)[:, 0]
    chosen = [(candidate["step"], candidate["prompt"]) for candidate in record["candidates"] if candidate["selected"]]
    for axis, (key, title) in zip(axes, SCORES.items(), strict=True):
        grid = np.full((rows, columns), np.nan)
        for candidate in record["candidates"]:
            grid[candidate["prompt"], candidate["step"]] = candidate[key]
        image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axis.scatter(*zip(*chosen, strict=True), s=14, facecolors="none", edgecolors="red", linewidths=1)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylabel("prompt", fontsize=8)
        figure.colorbar(image, ax=axis)
    axes[-1].set_xlabel("denoising step, from noise to video (red: taken)", fontsize=8)
    figure.suptitle(f"selection {record['selection']}: {record['samples']} samples", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
