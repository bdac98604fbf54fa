"""Charts of a run: one cell a candidate and map, stronger for higher scores; one line a loss."""

import re

import pytest

from s2q.report.run_charts import LOSSES, loss_chart, loss_keys, selection_chart, sensitivity_chart
from s2q.selection.plot import SCORES


def record(prompts=2, steps=3, **changes):
    candidates = [
        {
            "prompt": prompt,
            "step": step,
            "diffusion_salience": 0.25 * (prompt + step) % 1.0,
            "quantization_salience": 0.5,
            "salience": 0.5 * step % 1.0,
            "selected": (prompt, step) in ((0, 2), (1, 0)),
        }
        for prompt in range(prompts)
        for step in range(steps)
    ]
    return {"prompts": ["a", "b"][:prompts], "candidates": candidates} | changes


def cells(text):
    pattern = r'class="cell" x="([\d.]+)" y="([\d.]+)" .*?fill-opacity="([\d.]+)"><title>(.*?)</title>'
    return [(float(x), float(y), float(strength), tip) for x, y, strength, tip in re.findall(pattern, text)]


def test_every_candidate_has_a_cell_in_each_map_and_selected_ones_a_frame():
    text = str(selection_chart(record()))
    drawn = cells(text)
    assert len(drawn) == 6 * len(SCORES)
    assert text.count('class="selected"') == 2 * len(SCORES)
    assert [tip for *_, tip in drawn[:3]] == [
        "prompt 1, step 1: 0",
        "prompt 1, step 2: 0.25",
        "prompt 1, step 3: 0.5, selected",
    ]
    assert "6 candidates" in text
    assert "2 are selected" in text


def test_a_higher_score_has_a_fuller_colour():
    diffusion, quantization, product = (cells(str(selection_chart(record())))[i : i + 6] for i in (0, 6, 12))
    assert [strength for _, _, strength, _ in diffusion] == [0.08, 0.31, 0.54, 0.31, 0.54, 0.77]
    assert {strength for _, _, strength, _ in quantization} == {0.54}
    assert [strength for _, _, strength, _ in product] == [0.08, 0.54, 0.08] * 2


def test_steps_run_to_the_right_and_prompts_downwards():
    drawn = cells(str(selection_chart(record())))[:6]
    assert drawn[0][0] < drawn[1][0] < drawn[2][0]
    assert drawn[0][1] == drawn[2][1] < drawn[3][1]


@pytest.mark.parametrize(("prompts", "steps"), [(2, 1), (2, 1000)])
def test_the_chart_fits_into_its_frame(prompts, steps):
    text = str(selection_chart(record(prompts, steps)))
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', text).groups())
    for x, y, *_ in cells(text):
        assert 0 <= x < width
        assert 0 <= y < height


def block(index, **loss):
    return {"name": f"blocks.{index} <b>", "loss": loss}


def test_the_loss_of_each_block_is_a_point_of_each_line():
    blocks = [block(0, rtn=0.5, initial=0.2, final=0.01), block(1, rtn=1.0, initial=0.4, final=0.04)]
    text = str(loss_chart(blocks))
    assert text.count("<polyline") == 3
    assert "blocks.1 &lt;b&gt;, as packed: 0.04" in text
    heights = {
        key: [float(y) for y in re.findall(rf'class="dot {key}" cx="[\d.]+" cy="([\d.]+)"', text)] for key in LOSSES
    }
    assert all(len(values) == 2 for values in heights.values())
    assert heights["rtn"][0] < heights["initial"][0] < heights["final"][0], "less is lower"
    assert loss_keys(blocks) == LOSSES


def test_a_loss_that_no_block_has_is_left_out():
    blocks = [block(0, rtn=0.5, final=0.01), block(1)]
    text = str(loss_chart(blocks))
    assert list(loss_keys(blocks)) == ["rtn", "final"]
    assert text.count("<polyline") == 2
    assert "before learning" not in text


@pytest.mark.parametrize("blocks", [[], [block(0)], [block(0, final=0.0)]])
def test_without_losses_there_is_no_chart(blocks):
    assert str(loss_chart(blocks)) == ""


def test_bars_of_sensitivity_are_as_long_as_the_errors():
    kinds = [{"linears": f"blocks.*.{name}", "count": 6, "mean": mean} for name, mean in (("a", 0.4), ("b", 0.1))]
    text = str(sensitivity_chart({"kinds": kinds}))
    first, second = (float(width) for width in re.findall(r'class="bar" .*?width="([\d.]+)"', text))
    assert first == pytest.approx(4 * second, rel=0.01)
    assert "blocks.*.a, 6 linears: 0.4" in text
