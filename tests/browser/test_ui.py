"""`s2q ui` as a user has it: typed, pressed and looked at in a browser."""

import re
import socket
import threading
from importlib.util import find_spec

import pytest
from PIL import Image

from s2q.ui.serve import serve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed"),  # it takes seconds to import
    pytest.mark.filterwarnings("ignore:.*:pandas.errors.Pandas4Warning"),
]
STAGE = re.compile("full precision - ")
MODELS = ["shapes-wan-i2v", "shapes-cogvideox"]


@pytest.fixture(scope="module")
def connections():
    """Every address that this process connects to or looks up, from before Gradio is imported."""
    asked = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def recorded_connect(self, address):
        asked.append(address[0] if isinstance(address, tuple) else "unix")
        return connect(self, address)

    def recorded_look_up(host, *args, **kwargs):
        asked.append(host)
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", recorded_connect)
        patch.setattr(socket, "getaddrinfo", recorded_look_up)
        yield asked


@pytest.fixture(scope="module")
def address(connections):
    """The page with two embedded models, in a thread of this process."""
    there, stop, found = threading.Event(), threading.Event(), []

    def ready(local, labels):
        assert labels[:2] == MODELS
        found.append(local)
        there.set()

    thread = threading.Thread(
        target=serve,
        kwargs={"models": MODELS, "port": 0, "ready": ready, "until": stop.is_set},
        daemon=True,
    )
    thread.start()
    assert there.wait(120)
    yield found[0]
    stop.set()
    thread.join(30)


@pytest.fixture
def visitor(visit, address):
    with visit() as visitor:
        page = visitor.open(address)
        page.locator("#generate").wait_for()
        page.get_by_role("button", name="Settings").click()
        yield visitor


def fill(page, **fields):
    for label, text in fields.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(text)


def choose(page, label, option):
    page.get_by_label(label).click()
    page.get_by_role("option", name=option, exact=True).click()


def host(address):
    return address.split("/")[2]


def rows(page):
    table = page.frame_locator("iframe.players-frame").locator("table")
    table.wait_for(timeout=60_000)
    cells = [row.locator("th, td").all_inner_texts() for row in table.locator("tbody tr").all()]
    return {first: others for first, *others in cells}


def test_a_prompt_is_shown_by_two_models_with_their_difference_and_figures(visitor, address):
    page = visitor.page
    choose(page, "Left model, the reference", "shapes-cogvideox")
    page.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('a ')")
    choose(page, "Right model", "shapes-cogvideox, rtn-w4a6")
    fill(page, Prompt="a red circle moving left on a grey background", Denoising_steps="2", Seed="3")
    page.locator("#generate").click()
    numbers = rows(page)
    assert numbers["PSNR, mean of frames"][1].endswith(" dB")
    assert 0 < float(numbers["Velocity error, relative"][1]) < 1
    full, quantized = (float(text.removesuffix(" MB")) for text in numbers["Transformer weights"])
    assert full > 3 * quantized
    assert all(text.endswith(" s") for text in numbers["Time"])
    player = page.frame_locator("iframe.players-frame").locator(".player")
    assert player.locator("h3").inner_text() == "a red circle moving left on a grey background"
    assert player.locator(".who").all_inner_texts() == [
        "shapes-cogvideox",
        "shapes-cogvideox, rtn-w4a6",
        "Difference × 4",
    ]
    played = "(player) => [...player.querySelectorAll('video')].map((video) => [video.readyState, video.videoWidth])"
    page.wait_for_function("document.querySelector('iframe').contentDocument.querySelector('video').readyState === 4")
    assert player.evaluate(played) == [[4, 256]] * 3
    assert "seed 3 · 32 × 32" in player.locator(".note").inner_text()
    visitor.check(host(address))


@pytest.fixture
def grey_image(tmp_path):
    Image.new("RGB", (48, 48), (128, 128, 128)).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


def test_an_image_to_video_model_takes_an_image_or_the_first_frame_of_its_caption(visitor, grey_image):
    page = visitor.page
    assert page.get_by_label("Left model, the reference").input_value() == MODELS[0]
    assert page.locator("input[type=file]").count() == 1
    fill(page, Denoising_steps="1")
    page.get_by_label("Measure the velocity error").uncheck()
    page.locator("#generate").click()
    numbers = rows(page)
    assert "Velocity error, relative" not in numbers
    assert [text.endswith(" dB") for text in numbers["First frame, PSNR"]] == [True, True]
    fill(page, Prompt="red")
    page.locator("input[type=file]").set_input_files(grey_image)
    page.locator(".image-frame img").wait_for()
    page.locator("#generate").click()
    shown = page.frame_locator("iframe.players-frame").locator(".player h3")
    shown.filter(has_text=re.compile("^red$")).wait_for(timeout=60_000)
    assert visitor.errors == []


def test_bad_input_is_shown_as_an_error(visitor):
    page = visitor.page
    good = {"Prompt": "a red circle moving left on a grey background", "Denoising_steps": "1", "Frames": ""}
    for bad, message in (
        ({"Prompt": " "}, "prompt 1 of 1 is empty; describe the video"),
        ({"Denoising_steps": "few"}, "Denoising steps: got 'few'; expected a whole number, or nothing"),
        ({"Frames": "10"}, "num_frames"),
        ({"Prompt": "<b>a cat</b>"}, "has no image"),
    ):
        fill(page, **good | bad)
        page.locator("#generate").click()
        page.locator("#result [role=alert]").filter(has_text=message).wait_for()
    assert visitor.violations() == []
    assert visitor.errors == []


def test_cancel_stops_a_run(visitor):
    page = visitor.page
    fill(page, Denoising_steps="900")
    page.locator("#generate").click()
    page.get_by_text(STAGE).first.wait_for()
    page.locator("#cancel").click()
    page.get_by_text("Cancelled.").wait_for()


def test_cancel_stops_a_run_that_has_not_begun(visitor):
    page = visitor.page
    fill(page, Denoising_steps="900")
    page.locator("#generate").click()
    page.locator("#cancel").click()
    page.get_by_text("Cancelled.").wait_for()


def test_closing_the_page_stops_its_run_and_a_waiting_one_begins(visit, address):
    def start(visitor, steps):
        page = visitor.open(address)
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Measure the velocity error").uncheck()
        fill(page, Denoising_steps=steps)
        page.locator("#generate").click()
        return page

    with visit() as waiting:
        with visit() as closed:
            start(closed, "900").get_by_text(STAGE).first.wait_for()
            page = start(waiting, "1")
            page.get_by_text("waiting for another run").first.wait_for()
        assert "First frame, PSNR" in rows(page)


def test_the_server_asked_no_other_machine_for_anything(address, connections):
    assert host(address).split(":")[0] in connections, "its port is checked before"
    assert set(connections) <= {"127.0.0.1", "localhost", "::1", "unix"}
