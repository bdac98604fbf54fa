"""Runs of the page: what is shown of a result, of an error and of a run that was stopped."""

from importlib.util import find_spec

import pytest

from s2q.common.errors import InvalidInputError
from s2q.common.progress import silent
from s2q.ui.offers import offered

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
REQUEST = {
    "left": "shapes-cogvideox",
    "right": "shapes-cogvideox, rtn-w4a6",
    "prompt": "a red circle moving left on a grey background",
    "image": None,
    "seed": "7",
    "steps": "2",
    "guidance": "",
    "frames": "",
    "height": "",
    "width": "",
    "velocity": False,
}


@pytest.fixture(scope="module")
def page():
    """The module; it imports Gradio, which takes seconds."""
    from s2q.ui import page

    return page


@pytest.fixture(scope="module")
def offers():
    return offered(models=["shapes-cogvideox"])


@pytest.fixture
def asked(page, monkeypatch):
    """What the page asks for instead of generating it."""
    calls = []

    def generate(left, right, **options):
        calls.append((left.label, right.label, options))
        options["progress"]("full precision", 1, 2)
        return "a result"

    monkeypatch.setattr(page, "generate_side_by_side", generate)
    monkeypatch.setattr(page, "rendered", lambda result: f'<p class="x">{result}</p>')
    return calls


def test_a_request_is_read_and_its_result_is_framed(page, offers, asked):
    shown = page.Runs(offers, None).run(page.Request(**REQUEST), session="a", progress=silent)
    assert 'srcdoc="&lt;p class=&quot;x&quot;&gt;a result&lt;/p&gt;"' in shown
    ((left, right, options),) = asked
    assert (left, right) == (REQUEST["left"], REQUEST["right"])
    assert (options["prompt"], options["seed"], options["velocity"]) == (REQUEST["prompt"], 7, False)
    assert options["requested"] == {"num_inference_steps": 2}


def test_errors_are_shown_escaped(page, offers, asked, monkeypatch, caplog):
    runs, request = page.Runs(offers, None), page.Request(**REQUEST)
    shown = runs.run(page.Request(**REQUEST | {"guidance": "<b>"}), session="a", progress=silent)
    assert "Guidance scale: got &#x27;&lt;b&gt;&#x27;; expected a number, or nothing" in shown
    assert 'role="alert"' in shown

    def broken(*args, **options):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(page, "generate_side_by_side", broken)
    shown = runs.run(request, session="a", progress=silent)
    assert "ZeroDivisionError: by zero; the traceback is in the terminal" in shown
    assert "Traceback" in caplog.text


def test_a_run_is_stopped_before_it_begins_and_while_it_works_and_the_next_one_is_not(page, offers, asked):
    runs, request = page.Runs(offers, None), page.Request(**REQUEST)
    runs.stop("a")  # nothing to stop
    runs.announce("a")
    runs.stop("a")
    assert "Cancelled." in runs.run(request, session="a", progress=silent)
    assert asked == []
    runs.announce("a")
    shown = runs.run(request, session="a", progress=lambda stage, done, total: runs.stop("a"))
    assert "Cancelled." in shown
    runs.announce("a")
    runs.stop("b")
    assert "a result" in runs.run(request, session="a", progress=silent)


def test_the_first_pair_is_full_precision_and_quantized(page, offers):
    left, right = page._first_pair(offers)
    assert (left.label, right.label) == ("shapes-cogvideox", "shapes-cogvideox, table-w4a8")
    with pytest.raises(InvalidInputError, match="no two of them can be compared"):
        page._first_pair(offers[:1])
