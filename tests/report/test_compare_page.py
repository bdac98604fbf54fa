import re

import numpy as np
import pytest

from pages import Outline, metric
from s2q.report import compare_table as comparison
from s2q.report.charts import error_chart
from s2q.report.compare_page import Scene, render_compare_page, scene_sheet
from s2q.report.video import reduced, tiled


def entry(label, velocity, **changes):
    metrics = {
        "velocity_relative_error": metric(velocity, velocity * 0.9, velocity * 1.2),
        "adherence_all": metric(0.5, 0.25, 0.75),
        "reference_adherence_all": metric(1.0),
    }
    fields = {
        "label": label,
        "recipe": label,
        "checkpoint": None,
        "peer": None,
        "description": "What <it> is.",
        "width": "w4a6",
        "storage": {"full_precision_bytes": 400, "quantized_bytes": 100, "ratio": 4.0},
        "seconds": 12.3,
        "simulated": False,
        "overrides": [],
        "error": None,
        "metrics": metrics,
    }
    return fields | changes


def result(**changes):
    winners = {
        "velocity_relative_error": {"best": "good", "winner": "good", "tied_with": []},
        "adherence_all": {"best": "good", "winner": None, "tied_with": ["bad<1>"]},
    }
    difference = {"a": "good", "b": "bad<1>", "metric": "velocity_relative_error", "kind": "ratio", "estimate": 0.125}
    difference |= {"low": 0.1, "high": 0.2, "p": 0.002, "p_holm": 0.004, "n_prompts": 12}
    adherence = difference | {
        "metric": "adherence_all",
        "kind": "difference",
        "estimate": 0.25,
        "low": None,
        "high": None,
    }
    fields = {
        "model": "shapes-cogvideox",
        "n_prompts": 12,
        "n_seeds": 2,
        "prompts": ["a"],
        "calibration": {"prompts": "the model's own", "seed": 0},
        "entries": [
            entry("bad<1>", 0.008, simulated=True, overrides=["clip.constant=0.9"]),
            entry("broken", 0.0, metrics={}, error="cannot", storage=None, seconds=None),
            entry("good", 0.001),
            entry("wide", 0.0001, width="w8a8"),
        ],
        "groups": [
            {"width": "w8a8", "ranking": ["wide"], "winners": {}, "differences": []},
            {
                "width": "w4a6",
                "ranking": ["good", "bad<1>"],
                "winners": winners,
                "differences": [difference, adherence | {"p_holm": None}],
            },
        ],
        "reference_metrics": {"adherence_all": metric(1.0)},
        "noise_floor": {"definition": "another seed", "n_pairs": 12, "metrics": {"psnr_frame_mean_db": 19.0}},
        "warning": None,
        "settings": {
            "frame_rate": 8,
            **{"num_frames": 9, "height": 32, "width": 48, "num_inference_steps": 20, "dtype": "bfloat16"},
            **{"seeds": [0, 1], "interval": "over prompts"},
        },
        "definitions": {"winner": "beats all", "p_holm": "corrected"},
        "versions": {"s2q": "0.1.0"},
    }
    return fields | changes


def scenes(count=3):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (5, 32, 48, 3), dtype=np.uint8) for _ in range(count)]
    labels = ["good", "bad<1>", *(f"more-{i}" for i in range(count))][: count - 1]
    return [
        Scene(prompt='a "red" circle', seed=3, reference=frames[0], entries=dict(zip(labels, frames[1:], strict=True)))
    ]


def test_the_table_is_ranked_and_says_who_won():
    wide, narrow = comparison.groups_of(result())
    assert (wide.width, wide.verdict) == ("w8a8", "")
    assert [row.label for row in narrow.rows] == ["good", "bad<1>", "broken"]
    assert narrow.verdict == "w4a6: good is best in velocity error; all are tied in adherence"
    velocity, adherence = narrow.rows[0].cells
    assert (velocity.value, velocity.interval, velocity.best) == ("0.00100", "0.000900 to 0.00120", True)
    assert not adherence.best
    assert (narrow.rows[0].storage, narrow.rows[0].seconds) == ("4.00×", "12 s")
    assert (narrow.rows[2].error, narrow.rows[2].storage) == ("cannot", "–")


def test_a_tie_of_some_names_them():
    group = {"width": "w4a6", "ranking": ["good", "bad<1>", "wide"], "differences": []}
    group["winners"] = {"velocity_relative_error": {"best": "good", "winner": None, "tied_with": ["wide"]}}
    (found, *_) = comparison.groups_of(result(groups=[group]))
    assert found.verdict == "w4a6: good is tied with wide in velocity error"


def test_markdown_is_a_table_with_everything():
    text = comparison.markdown(result(warning="too few prompts"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    for expected in (
        "**0.00100** [0.000900 to 0.00120]",
        "`bad<1>` (clip.constant=0.9, simulated)",
        "- `broken`: cannot",
        "**too few prompts.**",
    ):
        assert expected in text
    assert rows[0] == "| recipe | storage | velocity error | adherence | quantized in |"
    assert "winner: beats all" in text


def test_the_page_is_one_well_formed_file():
    shown = scenes()
    text = render_compare_page(result(), shown, sheet=scene_sheet(shown), command="s2q compare <x>")
    page = Outline(text)
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert "bad<1>" in page.text
    assert "What &lt;it&gt; is." in text
    assert page.text.count("simulated") == 1
    assert "good: 0.1 % in 0.205 min" in text
    assert page.text.count("clip.constant=0.9") == 1
    assert "cannot" in page.text
    assert "× 0.125" in page.text
    assert "+25.0 %" in page.text
    assert len(page.all("video")) == 1
    corners = [(one["data-corner"], one["data-difference"]) for one in page.all("canvas")]
    assert corners == [("0 0", "0 0"), ("240 0", "720 0"), ("480 0", "960 0")], "5 tiles of 240 x 160 in a row"


def test_a_page_without_videos_or_figures():
    nothing = [entry("broken", 0.0, metrics={}, error="cannot")]
    text = render_compare_page(
        result(entries=nothing, groups=[], noise_floor=None, warning="few"), [], sheet=None, command="s2q compare x"
    )
    page = Outline(text)
    assert not page.all("video")
    assert "Few." in " ".join(page.text)


def test_the_chart_has_every_model_in_place():
    groups = [("w4a6", [("a", metric(0.001, 0.0009, 0.0012)), ("b<", metric(0.01))]), ("w4a4", [("c", metric(0.1))])]
    text = str(error_chart(groups))
    assert Outline(text).text.count("b<") == 1
    x = [float(one) for one in re.findall(r'<circle[^>]*cx="([0-9.]+)"', text)]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2), "equal steps for equal ratios"
    assert text.count("whisker") == 1
    assert error_chart([("w4a6", [("a", metric(0.0))])]) == ""


def test_tiles_stand_apart_on_whole_blocks():
    videos = [np.full((2, 10, 20, 3), value, np.uint8) for value in (10, 20, 30)]
    canvas = tiled(videos, columns=2)
    assert canvas.shape == (2, 32, 64, 3)
    for index, value in enumerate((10, 20, 30)):
        top, left = index // 2 * 16, index % 2 * 32
        assert (canvas[:, top : top + 16, left : left + 32] == value).all()


def test_large_videos_are_averaged_and_small_ones_kept():
    frames = np.zeros((1, 4, 8, 3), np.uint8)
    frames[:, :, ::2] = 100
    small = reduced(frames, longest=4)
    assert small.shape == (1, 2, 4, 3)
    assert (small == 50).all()
    assert reduced(frames, longest=8) is frames


def test_recipes_of_other_methods_are_marked_apart_from_those_of_the_package():
    names = ["svdquant-w4a6", "s2q-w4a6", "table-w4a8", "mine"]
    entries = [entry(name, 0.001 * (place + 1)) for place, name in enumerate(names)]
    group = {"width": "w4a6", "ranking": names, "winners": {}, "differences": []}
    page = render_compare_page(result(entries=entries, groups=[group]), scenes(3), sheet=None, command="s2q")
    marks = {
        name: len(re.findall(rf'class="point {name}">(?:(?!</g>).)*<title>', page))
        for name in ("rival", "ours", "peer")
    }
    assert marks == {"rival": 1, "ours": 3, "peer": 0}
