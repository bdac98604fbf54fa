"""Requests from several threads: the results of one after another, whatever state of torch the threads set."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reliability import record

from quick import quick
from s2q.checkpoint import load_pipeline
from s2q.common.devices import resident_bytes
from s2q.common.errors import InvalidInputError
from s2q.generation.denoise import denoise
from s2q.generation.exclusive import exclusive
from s2q.generation.generate import generate
from s2q.generation.settings import resolve_settings
from s2q.nn import set_backend
from s2q.planning.workload import workload_of
from s2q.run.quantize import quantize
from s2q.selection.options import Calibration
from states import STATES
from tiny import prompts_for, tiny_pipeline, video_size
from tiny_families import FAMILIES

THREADS = 4
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0}
EACH = quick(FAMILIES, "cogvideox", "wan 2.2 a14b", "hunyuanvideo 1.5", "ltx-2 image")
SIZES = [{"num_frames": 9, "height": 16, "width": 16}, {"num_frames": 1, "height": 32, "width": 16}]
FLAT = 16 << 20
"""Growth of resident memory, of 600 MB, that is noise of malloc's arenas, one of each thread."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("threads") / "out"
    changes = ["calibration.steps=1", "calibration.samples=1", "calibration.n_prompts=1", "distillation.epochs=1"]
    quantize(tiny_pipeline("cogvideox"), recipe="s2q-w4a6", out=out, prompts=["a"], overrides=changes)
    return out


@pytest.fixture
def pipe(folder):
    return load_pipeline(folder)


def request(pipe, number):
    """A request like no other: prompt, seed, size and number of steps."""
    settings = SETTINGS | SIZES[number % 2] | {"num_inference_steps": 1 + number % 3}
    prompt = "abcdefgh"[number % 8] * (1 + number % 5)
    (video,) = generate(pipe, prompts=[prompt], seeds=[number], **settings)
    return video


def in_threads(work, count):
    """Results of numbers from 0, computed in threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(count)))


def tensors():
    """How many tensors there are."""
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def check_requests(pipe, count):
    """The same requests in threads and one after another; returns how much resident memory grew in the second half."""
    serial = [request(pipe, number) for number in range(count)]

    def is_equal(number):
        video = request(pipe, number)
        return torch.equal(video.latents, serial[number].latents) and torch.equal(video.frames, serial[number].frames)

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(is_equal, range(count)))
        before, resident = tensors(), resident_bytes()
        assert all(pool.map(is_equal, range(count)))
        assert tensors() == before
        return resident_bytes() - resident


@pytest.mark.parametrize("backend", ["auto", "fastest"])
def test_requests_of_threads_equal_those_of_one_and_leave_no_tensor_behind(pipe, backend):
    set_backend(pipe.transformer, backend)
    check_requests(pipe, 6)


@pytest.mark.parametrize("state", [state for state in STATES if not state.startswith("default ")])
def test_a_state_of_torch_in_one_thread_does_not_reach_another(pipe, state):
    serial = [request(pipe, number) for number in range(4)]

    def in_state(number):
        if number % 2:
            return request(pipe, number)
        with STATES[state]():
            return request(pipe, number)

    for number, video in enumerate(in_threads(in_state, 4)):
        assert torch.equal(video.latents, serial[number].latents), number


@pytest.mark.parametrize("name", EACH)
def test_another_thread_may_change_default_dtype_and_random_numbers(name):
    pipe = tiny_pipeline(name, num_layers=1)
    settings = SETTINGS | video_size(pipe)
    if name == "minimax-h3":
        del settings["guidance_scale"]  # has none

    def latents():
        return generate(pipe, prompts=prompts, **settings)[0].latents

    prompts = prompts_for(pipe, "a")
    expected, stop = latents(), threading.Event()

    def change():
        while not stop.is_set():
            for dtype in (torch.bfloat16, torch.float64, torch.float16):
                torch.set_default_dtype(dtype)
                torch.manual_seed(7)

    other = threading.Thread(target=change)
    other.start()
    try:
        different = [not torch.equal(latents(), expected) for _ in range(3)]
    finally:
        stop.set()
        other.join()
        torch.set_default_dtype(torch.float32)
    assert not any(different)


@pytest.mark.parametrize("name", EACH)
def test_components_of_every_family_are_locked(name):
    first, second = tiny_pipeline(name, num_layers=1), tiny_pipeline(name, num_layers=1)
    second.register_modules(vae=first.vae)
    entered, other = threading.Event(), tiny_pipeline(name, num_layers=1)

    def enter(pipe):
        with exclusive(pipe):
            entered.set()

    with exclusive(first), exclusive(first):
        thread = threading.Thread(target=enter, args=(second,))
        thread.start()
        assert not entered.wait(0.05)  # they share a component
        free = threading.Thread(target=enter, args=(other,))
        free.start()
        assert entered.wait(10)
        free.join()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("asked", [{"guidance_scale": 1.0}, {"scheduler": "FlowMatchLCMScheduler", "shift": 3.0}])
def test_defaults_are_those_of_the_pipeline_while_another_thread_generates(asked):
    pipe = tiny_pipeline("hunyuanvideo 1.5", num_layers=1)
    group, resolved = Calibration(**video_size(pipe), steps=2), []
    expected = workload_of(pipe, group, recommended={}, components={})
    other = threading.Thread(target=lambda: resolved.append(workload_of(pipe, group, recommended={}, components={})))

    def step_done():
        if other.ident is None:
            other.start()
        other.join(0.1)

    settings = resolve_settings(pipe, requested=asked | {"num_inference_steps": 2} | video_size(pipe))
    denoise(pipe, ["a"], seeds=[0], settings=settings, decode=False, step_done=step_done)
    other.join(10)
    assert resolved == [expected]
    assert expected.generation["guidance_scale"] == pipe.guider.guidance_scale > 1


def test_a_request_that_fails_leaves_the_pipeline_to_others(pipe):
    def ask(number):
        if number % 2:
            with pytest.raises(InvalidInputError, match="num_frames"):
                generate(pipe, prompts=["a"], num_frames=8, height=16, width=16)
            return None
        return request(pipe, number)

    serial = [None if number % 2 else request(pipe, number) for number in range(8)]
    for found, expected in zip(in_threads(ask, 8), serial, strict=True):
        assert found is expected is None or torch.equal(found.latents, expected.latents)


@pytest.mark.faults
def test_200_requests_of_4_threads_equal_those_of_one_and_memory_is_flat(pipe):
    growth = {}
    for backend in ("auto", "fastest"):
        set_backend(pipe.transformer, backend)
        growth[backend] = check_requests(pipe, 200)
    record("threads", {"threads": THREADS, "requests": 2 * 2 * 200, "different": 0, "resident_growth_bytes": growth})
    assert max(growth.values()) < FLAT
