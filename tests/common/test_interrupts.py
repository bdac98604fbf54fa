import os
import signal
import threading

import pytest

from s2q.common.errors import InvalidInputError, ResourceError
from s2q.common.interrupts import finish_first, resumable


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_work_is_done(number):
    done, caught = [], []
    before = signal.signal(number, lambda *_: caught.append(list(done)))
    try:
        with finish_first():
            os.kill(os.getpid(), number)
            done.append("write")
        assert caught == [["write"]]
        os.kill(os.getpid(), number)
        assert len(caught) == 2, "the handler is back"
    finally:
        signal.signal(number, before)


def test_an_interrupt_is_raised_after_the_work():
    done = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        with pytest.raises(KeyboardInterrupt), finish_first():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("write")
        assert done == ["write"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_of_the_work_passes_and_other_threads_may_write():
    with pytest.raises(KeyError), finish_first():
        raise KeyError
    errors = []

    def write():
        try:
            with finish_first():
                pass
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert errors == []


@pytest.mark.parametrize(
    ("error", "kept", "noted"),
    [
        (KeyboardInterrupt(), True, True),
        (ResourceError("the disk is full"), True, True),
        (KeyboardInterrupt(), False, False),
        (InvalidInputError("a wrong recipe"), True, False),
    ],
)
def test_a_run_that_ends_early_says_how_to_resume_if_results_are_kept(tmp_path, error, kept, noted):
    if kept:
        (tmp_path / "run").mkdir()
    with pytest.raises(type(error)) as caught, resumable(tmp_path / "run"):
        raise error
    assert bool(getattr(caught.value, "__notes__", [])) == noted
