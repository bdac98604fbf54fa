"""The report page of a run and the page of a comparison, in a real browser, opened from the disk."""

import re

import numpy as np
import pytest

from pages import attention
from report.test_compare_page import result, scenes
from report.test_page import content, evaluation
from s2q.report.compare_page import render_compare_page, scene_sheet
from s2q.report.page import PlayerPair, render_page

FRAMES = 16
FRAME_OF_EACH = (
    "(player) => [...player.querySelectorAll('video')].map((video) => Math.floor(video.currentTime * 8 + 1e-3))"
)


def moving(level):
    """A bar that moves by a pixel a frame, of one grey level, on a dark ground."""
    frames = np.full((FRAMES, 24, 32, 3), 20, np.uint8)
    for index in range(FRAMES):
        frames[index, :, index : index + 4] = level
    return frames


def report_page():
    values = {"adherence_shape": 0.0, "reference_adherence_shape": 1.0, "ssim": 0.5, "psnr_frame_mean_db": 31.24}
    pairs = [
        PlayerPair(prompt=f"a bar moving {where}", seed=3, reference=moving(200), student=moving(180), metrics=values)
        for where in ("left", "right")
    ]
    candidate = {"prompt": 0, "step": 0, "diffusion_salience": 1.0, "quantization_salience": 1.0, "salience": 1.0}
    kinds = [{"linears": "blocks.*.to_q", "count": 2, "mean": 0.25}]
    return render_page(
        content(
            pairs=pairs,
            evaluation=evaluation(sensitivity={"definition": "of one kind", "n_videos": 3, "kinds": kinds}),
            selection={
                "selection": "sds",
                "prompts": ["a"],
                "candidates": [candidate | {"selected": True}],
                "samples": 1,
            },
            blocks=[{"name": "blocks.0", "loss": {"rtn": 0.5, "final": 0.1}, "attention": attention()}],
            frames=moving(200),
            notes=["The selection of samples is not in this model."],
            stages=[{"Stage": "collect", "Planned peak memory": "5 MB", "Measured time": "3 s"}],
        )
    )


def compare_page():
    shown = scenes()
    return render_compare_page(result(), shown, sheet=scene_sheet(shown), command="s2q compare <x>")


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    pages = {"report": report_page(), "compare": compare_page()}
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text)
    return {name: (folder / f"{name}.html").as_uri() for name in pages}


@pytest.mark.parametrize("name", ["report", "compare"])
def test_pages_log_no_error_ask_nobody_fit_the_window_and_are_accessible(visit, addresses, name):
    with visit() as visitor:
        page = visitor.open(addresses[name])
        page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
        visitor.check()


@pytest.fixture
def report(visit, addresses):
    with visit() as visitor:
        page = visitor.open(addresses["report"])
        page.wait_for_function("[...document.querySelectorAll('video')].every((video) => video.readyState === 4)")
        yield page
        assert visitor.errors == []


def test_videos_of_a_player_stay_within_a_frame_of_each_other(report):
    apart = report.evaluate(
        f"""async (frames) => {{
          const frameOfEach = {FRAME_OF_EACH};
          const worst = [];
          for (const player of document.querySelectorAll(".player")) {{
            for (let at = 0; at < 40; at++) {{
              await new Promise(requestAnimationFrame);
              const [first, ...others] = frameOfEach(player);
              const behind = others.map((other) => (other - first + frames) % frames);
              worst.push(...behind.map((count) => Math.min(count, frames - count)));
            }}
          }}
          return worst;
        }}""",
        FRAMES,
    )
    assert len(apart) == 2 * 40 * 2
    assert max(apart) <= 1


def test_keys_play_step_wipe_and_show_the_difference(report):
    first = report.locator(".player").first
    report.keyboard.press(" ")
    assert report.locator("#play-all .text").inner_text() == "Play all"
    frame_of = FRAME_OF_EACH
    at = first.evaluate(frame_of)[0]
    report.keyboard.press("ArrowRight")
    assert first.evaluate(frame_of) == [(at + 1) % FRAMES] * 3
    report.keyboard.press("ArrowLeft")
    report.keyboard.press("ArrowLeft")
    assert first.evaluate(frame_of) == [(at - 1) % FRAMES] * 3
    assert first.locator("output").inner_text() == f"{(at - 1) % FRAMES + 1} / {FRAMES}"
    report.keyboard.press("d")
    assert not first.locator(".difference video").is_visible()
    report.keyboard.press("w")
    assert report.locator("#wipe").is_checked()
    report.keyboard.press(" ")
    assert first.locator(".toggle").get_attribute("aria-label") == "Pause"


def test_the_wipe_slider_uncovers_the_full_precision_side(report):
    report.locator("#play-all").click()
    report.locator("#wipe").check()
    player = report.locator(".player").first
    video = player.locator(".student video")
    box = video.bounding_box()
    assert box["x"] == player.locator(".reference video").bounding_box()["x"]
    player.locator(".wipe-position").fill("25")
    assert video.evaluate("(one) => getComputedStyle(one).clipPath") == "inset(0px 0px 0px 25%)"
    report.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 10)
    assert abs(float(player.locator(".wipe-position").input_value()) - 75) <= 1


def test_the_frame_slider_shows_the_frame_on_all_videos(report):
    player = report.locator(".player").first
    player.locator(".transport input").fill("5")
    assert player.evaluate(FRAME_OF_EACH) == [5, 5, 5]
    assert player.locator("output").inner_text() == f"6 / {FRAMES}"


def test_the_comparison_draws_every_entry_and_its_difference(visit, addresses):
    levels = """() => [...document.querySelectorAll("canvas")].map((canvas) => {
      const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return data.reduce((sum, value, at) => sum + (at % 4 < 3 ? value : 0), 0) / (0.75 * data.length);
    })"""
    with visit() as visitor:
        page = visitor.open(addresses["compare"])
        page.wait_for_function("document.querySelector('video').readyState === 4")
        page.locator("#play-all").click()
        page.locator(".transport input").fill("2")
        page.wait_for_function(f"({levels})().every((level) => level > 60)")
        page.locator("#show-difference").check()
        reference, *entries = page.evaluate(levels)
        assert 60 < reference, "full precision has no difference to itself: it stays"
        assert all(level > 100 for level in entries)
        assert visitor.errors == []


def test_the_wipe_of_a_comparison_uncovers_full_precision_under_every_entry(visit, addresses):
    halves = """() => [...document.querySelector(".player").querySelectorAll("canvas")].map((canvas) =>
      [0, canvas.width / 2].map((left) => {
        const {data} = canvas.getContext("2d").getImageData(left, 0, canvas.width / 2, canvas.height);
        return data.reduce((sum, value, at) => sum + value * (1 + at), 0);
      }))"""
    with visit() as visitor:
        page = visitor.open(addresses["compare"])
        page.wait_for_function("document.querySelector('video').readyState === 4")
        page.locator("#play-all").click()
        assert not page.locator(".wipe-at").first.is_visible()
        page.locator(".transport input").first.fill("2")
        page.evaluate("""async () => {
          const video = document.querySelector("video");
          do {
            if (video.seeking) await new Promise((done) => video.addEventListener("seeked", done, {once: true}));
            for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
          } while (video.seeking);
        }""")
        (left, _), *before = page.evaluate(halves)
        page.locator("#wipe").check()
        reference, *entries = page.evaluate(halves)
        assert reference[0] == left
        assert [entry[0] for entry in entries] == [left] * len(entries)
        assert [entry[1] for entry in entries] == [entry[1] for entry in before]
        page.locator(".wipe-position").first.fill("0")
        assert page.evaluate(halves)[1:] == before
        canvas = page.locator("canvas").nth(1)
        box = canvas.bounding_box()
        page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 5)
        assert abs(float(page.locator(".wipe-position").first.input_value()) - 75) <= 1
        assert visitor.errors == []


def test_a_video_that_cannot_be_decoded_is_named_and_the_others_play(visit, tmp_path):
    broken = re.sub(r"data:video/mp4;base64,[^\"]{40}", "data:video/mp4;base64," + "A" * 40, report_page(), count=1)
    (tmp_path / "broken.html").write_text(broken)
    with visit() as visitor:
        page = visitor.open((tmp_path / "broken.html").as_uri())
        note = page.locator(".unplayable")
        note.wait_for()
        assert note.count() == 1
        assert "cannot decode a video of this prompt" in note.inner_text()
        player = page.locator(".player").nth(1)
        page.wait_for_function("document.querySelectorAll('.player')[1].querySelector('video').readyState === 4")
        player.locator(".transport input").fill("5")
        assert player.evaluate(FRAME_OF_EACH) == [5, 5, 5]
