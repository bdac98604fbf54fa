import io

import pytest
from PIL import Image

from s2q.selection.plot import selection_plot


def record(*chosen):
    candidates = [
        {
            "prompt": prompt,
            "step": step,
            "selected": (prompt, step) in chosen,
            "diffusion_salience": step / 5,
            "quantization_salience": prompt / 2,
            "salience": prompt * step / 10,
        }
        for prompt in range(3)
        for step in range(6)
    ]
    return {"prompts": ["a", "b", "c"], "selection": "sds", "samples": len(chosen), "candidates": candidates}


def drawn(*chosen):
    return Image.open(io.BytesIO(selection_plot(record(*chosen)))).convert("RGB")


@pytest.mark.slow
def test_the_plot_is_a_picture_that_depends_on_what_was_chosen():
    one, other = drawn((0, 1), (2, 3)), drawn((0, 1), (2, 4))
    assert one.size == other.size
    assert one.tobytes() == drawn((0, 1), (2, 3)).tobytes()
    assert one.tobytes() != other.tobytes()


@pytest.mark.parametrize("chosen", [[(0, 0)], [(0, 1), (1, 1), (2, 5)]])
def test_each_of_the_three_panels_marks_the_chosen_candidates_red(chosen):
    picture = drawn(*chosen)
    red = sum(count for count, (r, g, b) in picture.getcolors(1 << 24) if r > 200 and g < 60 and b < 60)
    assert red >= 3 * 10 * len(chosen)
