"""Numbers as people read them."""

from typing import Any

NOTHING = {"mean": None, "low": None, "high": None}
"""The entry of a metric that was not measured."""

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def format_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit: `1234567` is "1.23 MB"."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_BYTE_UNITS) - 1:  # what would be shown as 1000
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.3g} {_BYTE_UNITS[unit]}"


def format_value(name: str, value: float | None) -> str:
    """Return a metric's value with as many digits as it deserves, in dB, levels of 255 (`_rms`) or per cent."""
    if value is None:
        return "–"
    if name.endswith("_db"):
        return f"{value:.1f} dB"
    if name.endswith("_rms"):
        return f"{value:.2f} levels"
    if name.endswith("black_frames"):
        return f"{value * 100:.1f} %"
    if "adherence" in name:
        return f"{value * 100:+.1f} %" if name.endswith("_change") else f"{value * 100:.1f} %"
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
    return f"{value:#.3g}"


def format_interval(name: str, low: float | None, high: float | None) -> str:
    """Return an interval, "33.1 to 35.2 dB"; a dash where there is none."""
    if low is None or high is None:
        return "–"
    first, second = format_value(name, low), format_value(name, high)
    for unit in (" dB", " %", " levels"):
        first = first.removesuffix(unit)
    return f"{first} to {second}"


def format_cell(value: Any) -> str:
    """Return any JSON value as the text of a table cell."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, (list, tuple)):
        return " × ".join(str(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_cell(item)}" for key, item in value.items())
    return str(value)


def format_sample(prompts: int, seeds: int) -> str:
    """Return what a figure was measured on: "16 prompts × 2 seeds"."""
    return f"{prompts} prompt{'s' if prompts != 1 else ''} × {seeds} seed{'s' if seeds != 1 else ''}"


def title_of(name: str) -> str:
    """Return a metric's name for people: "psnr_frame_mean_db" is "PSNR, mean of frames"."""
    titles = {
        "latent_relative_l2": "Latent relative L2",
        "latent_cosine": "Latent cosine",
        "psnr_frame_mean_db": "PSNR, mean of frames",
        "psnr_pooled_db": "PSNR, pooled",
        "ssim": "SSIM",
        "flicker_rms": "Flicker, RMS",
        "motion_ratio": "Motion, ratio",
        "speed_ratio": "Speed of the object, ratio",
        "first_frame_psnr_db": "First frame, PSNR",
        "black_frames": "Black frames",
        "lpips": "LPIPS",
        "clip_score": "CLIP score",
        "clipsim": "CLIPSIM (EvalCrafter)",
        "clip_temp": "CLIP-Temp (EvalCrafter)",
        "flow_score": "Flow score (EvalCrafter)",
        "vqa_a": "VQA-Aesthetic",
        "vqa_t": "VQA-Technical",
        "velocity_relative_error": "Velocity error, relative",
        "adherence_all_change": "Adherence, change",
    }
    if name in titles:
        return titles[name]
    reference = name.startswith("reference_")
    words = name.removeprefix("reference_").replace("adherence_", "Adherence, ").replace("_", " ")
    return f"{words} (full precision)" if reference else words
