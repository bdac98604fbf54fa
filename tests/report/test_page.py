import re

import numpy as np
import pytest

from pages import Outline, attention, metric
from s2q.common.errors import InvalidInputError
from s2q.report.charts import adherence_chart, velocity_chart
from s2q.report.formatting import format_bytes, format_cell, format_interval, format_value
from s2q.report.page import PageContent, PlayerPair, _map_sample, render_page
from s2q.report.video import PAGE_BYTES, encode_mp4, encode_within, reduced, video_bytes


def evaluation(**changes):
    return {
        "model": "runs/<quantized> & co",
        "reference": "shapes-cogvideox",
        "n_prompts": 12,
        "n_seeds": 2,
        "metrics": {
            "psnr_frame_mean_db": metric(34.26, 33.0, 35.5),
            "velocity_relative_error": metric(0.0034, 0.003, 0.004),
            "adherence_shape": metric(0.875, 0.7, 1.0),
            "reference_adherence_shape": metric(0.9, 0.8, 1.0),
            "adherence_all": metric(None),
            "reference_adherence_all": metric(None),
        },
        "velocity": {
            "definition": "of each step",
            "n_videos": 24,
            "steps": [
                {"step": i, "timestep": 999 - i, "mean": 0.01 / (i + 1), "low": 0.001, "high": 0.02} for i in range(5)
            ],
        },
        "noise_floor": {"definition": "another seed", "n_pairs": 12, "metrics": {"psnr_frame_mean_db": 19.4}},
        "videos": [],
        "settings": {"num_frames": 3, "seeds": [0, 1], "interval": "95 %, bootstrap"},
        "versions": {"s2q": "0.1.0", "torch": "2"},
    } | changes


def content(**changes):
    frames = np.arange(3 * 16 * 16 * 3, dtype=np.uint8).reshape(3, 16, 16, 3)
    values = {"adherence_shape": 0.0, "reference_adherence_shape": 1.0, "ssim": 0.5, "psnr_frame_mean_db": 31.24}
    pairs = [PlayerPair(prompt='a "red" <circle>', seed=3, reference=frames, student=frames // 2, metrics=values)]
    fields = {
        "title": "A comparison",
        "pairs": pairs,
        "evaluation": evaluation(),
        "storage": {"full_precision_bytes": 4_000_000, "quantized_bytes": 1_000_000, "ratio": 4.0},
        "recipe": {"name": "rtn-w4a6"},
        "tables": {"Layers": [{"name": "block.0", "bytes": 12345, "shape": [4, 8]}]},
        "commands": ["s2q quantize -m a -o <out>"],
        "seconds": {"quantize": 1.25},
    }
    return PageContent(**fields | changes)


def test_the_page_is_well_formed_and_holds_everything_itself():
    page = Outline(render_page(content()))
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#")), (tag, attributes)
    text = render_page(content())
    assert not re.search(r"https?://|@import|url\(", text)
    assert [video["src"][:15] for video in page.all("video")] == ["data:video/mp4;"] * 3
    assert page.all("img")[0]["src"].startswith("data:image/png;base64,")


def test_a_card_shows_the_first_frame_of_both_models_where_videos_start_from_an_image():
    assert "against the given image" not in render_page(content())
    first = {"first_frame_psnr_db": metric(28.44), "reference_first_frame_psnr_db": metric(31.02)}
    page = render_page(content(evaluation=evaluation(metrics=evaluation()["metrics"] | first)))
    assert "28.4 dB" in page
    assert "against the given image; full precision: 31.0 dB" in page


def test_what_is_shown_is_named_for_those_who_cannot_see_it():
    page = Outline(render_page(content()))
    assert page.all("html")[0]["lang"] == "en"
    for tag in ("video", "button", "svg"):
        for attributes in page.all(tag):
            assert attributes.get("aria-label") or attributes.get("aria-hidden") or attributes.get("id") == "play-all"
    assert all(image["alt"] for image in page.all("img"))
    assert [slider["aria-label"] for slider in page.all("input") if slider["type"] == "range"] == [
        'Wipe position of a "red" <circle>',
        'Frame of a "red" <circle>',
    ]
    assert {cell.get("scope") for cell in page.all("th")} == {"col", "row"}


def test_numbers_definitions_and_escaped_names_are_there():
    text = " ".join(" ".join(Outline(render_page(content())).text).split())
    for expected in (
        "4.00× smaller",
        "4 MB → 1 MB",
        "34.3 dB",
        "33.0 to 35.5 dB",
        "19.4 dB",
        "0.00340",
        "what it means",
        'a "red" <circle>',
        "runs/<quantized> & co",
        "s2q quantize -m a -o <out>",
        "12 prompts × 2 seeds",
        "12 345",
        "4 × 8",
    ):
        assert expected in text, expected


def test_the_run_is_shown_with_its_selection_losses_and_stages():
    candidate = {"prompt": 0, "step": 0, "diffusion_salience": 1.0, "quantization_salience": 1.0, "salience": 1.0}
    selection = {"selection": "sds", "prompts": ["a"], "candidates": [candidate | {"selected": True}], "samples": 1}
    stages = [{"Stage": "collect", "Planned peak memory": "5 MB", "Measured time": "3 s"}]
    blocks = [{"name": "blocks.0", "loss": {"rtn": 0.5, "final": 0.1}, "attention": attention()}]
    kinds = [{"linears": "blocks.*.to_q", "count": 2, "mean": 0.25}]
    judged = evaluation(sensitivity={"definition": "of one kind", "n_videos": 3, "kinds": kinds})
    page = Outline(render_page(content(evaluation=judged, selection=selection, blocks=blocks, stages=stages)))
    text = " ".join(" ".join(page.text).split())
    for expected in (
        "Selected samples",
        "Loss by block",
        "as packed",
        "Attention mass on the top tokens",
        "Attention over frames",
        "prompt 2, denoising step 5",
        "Planned and measured",
        "collect",
        "5 MB",
        "Of one kind; mean over 3 videos",
        "blocks.*.to_q",
    ):
        assert expected in text, expected
    assert len([svg for svg in page.all("svg") if svg.get("class") == "chart"]) == 7


@pytest.mark.parametrize(
    ("branch", "recorded", "shown"),
    [
        (0, {"guidance_branches": 2}, ", unconditional branch of guidance"),
        (1, {"guidance_branches": 2}, ", conditional branch of guidance"),
        (0, {"guidance_branches": 1}, ""),
        (0, {}, ""),
        (1, {}, ", conditional branch of guidance"),
    ],
)
def test_the_map_names_prompt_and_step_of_its_sample_and_the_branch_of_two(branch, recorded, shown):
    selection = {"prompts": ["a", {"prompt": "a <red> circle"}], "settings": {"num_inference_steps": 9}} | recorded
    record = attention(sample=f"prompt 1, step 4, branch {branch}")
    named = _map_sample(content(blocks=[{"name": "a", "loss": {}, "attention": record}], selection=selection))
    assert named == f"“a <red> circle”, denoising step 5 of 9{shown}"


def test_a_page_of_large_noisy_videos_stays_below_its_limit():
    noise = np.random.default_rng(0).integers(0, 255, (2, 240, 720, 3)).astype(np.uint8)
    pair = PlayerPair(prompt="noise", seed=0, reference=noise, student=255 - noise)
    limit = video_bytes(videos=12, other_bytes=0) / 24  # of two frames; a page has 49 of each of four pairs
    assert len(encode_mp4(reduced(noise, longest=512))) > limit
    data, pixels = encode_within(lambda longest: reduced(noise, longest=longest), most_bytes=limit, fps=8)
    assert len(data) <= limit
    assert pixels < 512
    assert len(render_page(content(pairs=[pair]))) < PAGE_BYTES


def test_notes_of_the_run_are_shown():
    assert "weights all <tokens> alike" in " ".join(
        Outline(render_page(content(notes=["weights all <tokens> alike"]))).text
    )


def test_sections_without_content_are_left_out():
    bare = content(
        evaluation=evaluation(velocity=None, noise_floor=None, n_prompts=4, metrics={"ssim": metric(0.9)}),
        storage=None,
        recipe=None,
        tables={"Layers": []},
        commands=(),
        seconds={},
    )
    text = " ".join(Outline(render_page(bare)).text)
    for absent in (
        "Storage",
        "Recipe",
        "Layers",
        "Velocity",
        "Prompt adherence",
        "None",
        "Selected",
        "Loss",
        "Planned",
    ):
        assert absent not in text
    assert "too few prompts for intervals" in text


def test_a_page_without_videos_is_refused():
    with pytest.raises(InvalidInputError, match="no videos"):
        render_page(content(pairs=[]))


def test_charts_stay_inside_their_frame_and_are_labelled():
    steps = [
        {"step": i, "timestep": 999, "mean": value, "low": 0.0, "high": 1.0} for i, value in enumerate((1e-9, 0.5, 0.0))
    ]
    chart = Outline(str(velocity_chart(steps)))
    for dot in chart.all("circle"):
        assert 0 <= float(dot["cx"]) <= 640
        assert 0 <= float(dot["cy"]) <= 260
    assert len(chart.all("circle")) == 3
    assert velocity_chart([{"step": 0, "timestep": 9, "mean": 0.0, "low": None, "high": None}]) == ""
    shape = Outline(str(adherence_chart([("<all>", metric(0.5, 0.2, 0.9), metric(None))])))
    assert len(shape.all("circle")) == 1
    assert "<all>: " not in shape.text
    assert adherence_chart([]) == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (999_960, "1 MB"), (3.9e12, "3.9 TB")],
)
def test_format_bytes_writes_the_text(count, text):
    assert format_bytes(count) == text


def test_format_value_writes_units_and_digits():
    assert format_value("psnr_pooled_db", 34.26) == "34.3 dB"
    assert format_value("adherence_all", 0.975) == "97.5 %"
    assert format_value("adherence_all_change", -0.025) == "-2.5 %"
    assert format_value("velocity_relative_error", 0.0034) == "0.00340"
    assert format_value("velocity_relative_error", 3.4e-6) == "3.40e-06"
    assert format_value("ssim", None) == "–"
    assert format_interval("adherence_all", 0.9, 1.0) == "90.0 to 100.0 %"
    assert format_interval("ssim", None, None) == "–"
    assert format_cell({"weight": 4, "on": True, "none": None}) == "weight 4, on yes, none –"
