"""Charts of attention: a line for each block, a tile for each block and frame, from what a run records."""

import re

import numpy as np
import pytest

from pages import Outline, attention
from s2q.report.attention_charts import MOST_BLOCKS, map_chart, map_sample, mapped, mass_chart, mass_summary


def blocks(count=2, **changes):
    return [{"name": f"blocks.{index} <b>", "attention": attention(**changes)} for index in range(count)]


def test_the_mass_of_each_block_is_a_line_and_their_mean_has_dots():
    text = str(mass_chart([*blocks(1, top=1.0), *blocks(1, top=20.0)]))
    assert text.count('class="line each"') == 2
    assert "blocks.0 &lt;b&gt;: 10% of the attention on the top 10% of the tokens" in text
    heights = [float(y) for y in re.findall(r'class="dot" cx="[\d.]+" cy="([\d.]+)"', text)]
    assert heights == sorted(heights, reverse=True), "more tokens have more attention"
    ends = [line.split()[0] for line in re.findall(r'points="([^"]+)"', text)]
    assert len(set(ends)) == 1, "all lines start at nothing"


def test_the_summary_has_the_mean_and_the_spread_over_blocks():
    text = mass_summary([*blocks(1, top=1.0), *blocks(1, top=20.0)])
    assert text.startswith("The most attended 10 % of the tokens receive 32 % of the attention (10 % to 54 % by block)")
    assert "text tokens 30 %" in text
    assert mass_summary([{"name": "a", "attention": None}]) == ""


def test_a_map_has_a_tile_for_each_block_and_frame_and_fades_with_less_attention():
    text = str(map_chart(blocks(2)))
    assert text.count("<image") == 2 * 3
    assert text.count('class="frame"') == 2 * 3
    page = Outline(text)
    assert all(image["href"].startswith("data:image/png;base64,") for image in page.all("image"))
    assert "blocks.1 <b>: up to 5.1 times" in " ".join(page.text)
    first, second = (page.all("image")[index]["href"] for index in (0, 1))
    assert first != second, "the first frame has the token that receives more"


def test_the_frames_of_the_video_lie_beneath_the_tiles():
    frames = np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3)).astype(np.uint8)
    text = str(map_chart(blocks(2), frames))
    assert text.count("<image") == 3 + 2 * 2 * 3, "three of the video, then grey and colour in each tile"
    assert ">video</text>" in text


@pytest.mark.parametrize(("columns", "grid"), [(1, (1, 4, 4)), (40, (13, 30, 45)), (5, (2, 40, 4))])
def test_the_map_fits_into_its_frame(columns, grid):
    frames, height, width = grid
    tokens = frames * height * width
    frames = np.zeros((5, 16, 24, 3), np.uint8)
    text = str(map_chart(blocks(columns, tokens=tokens, grid=grid), frames))
    wide, tall = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', text).groups())
    for x, y, w, h in re.findall(r'<rect class="frame" x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"', text):
        assert float(x) + float(w) <= wide
        assert float(y) + float(h) <= tall


def test_of_many_blocks_evenly_spaced_ones_are_shown():
    names = [block["name"] for block in mapped(blocks(40))]
    assert len(names) == MOST_BLOCKS
    assert names[0] == "blocks.0 <b>"
    assert names[-1] == "blocks.39 <b>"


def test_maps_are_of_one_sample_though_a_second_transformer_has_its_own():
    both = [*blocks(3), *blocks(2, sample="prompt 0, step 9, branch 1")]
    assert [block["attention"]["map"]["sample"] for block in mapped(both)] == ["prompt 1, step 4, branch 0"] * 3


def test_the_sample_is_read_from_its_name():
    assert map_sample(blocks(1)) == (1, 4, 0)
    assert map_sample(blocks(1, grid=None)) is None
    assert map_sample([]) is None


@pytest.mark.parametrize("record", [[], [{"name": "a", "attention": None}], [{"name": "a"}]])
def test_without_a_record_there_is_no_chart(record):
    assert str(mass_chart(record)) == str(map_chart(record)) == ""
