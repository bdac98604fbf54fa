import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import process_tasks
from s2q.common.errors import InvalidInputError, ResourceError, S2QError
from s2q.engines import processes, workers
from s2q.engines.engine import ATTEMPTS, InProcessEngine, Retry, WorkerEngine, fixed_threads
from s2q.engines.processes import ProcessEngine


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid):
    deadline = time.monotonic() + 30
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not lives(pid)


@pytest.fixture(scope="module")
def two_workers():
    with contextlib.closing(ProcessEngine(["cpu", "cpu"])) as engine:
        yield engine


@contextlib.contextmanager
def process_engine(*devices):
    with contextlib.closing(ProcessEngine(devices or ["cpu"])) as engine:
        yield engine


def test_results_messages_and_logs_come_from_every_task(two_workers, caplog):
    messages = []
    found = dict(two_workers.map(process_tasks.describe, "abcde", on_message=messages.append))
    assert [found[index][0] for index in range(5)] == list("abcde")
    assert sorted(messages) == [("started", letter) for letter in "abcde"]
    assert sorted(caplog.messages) == [f"task {letter}" for letter in "abcde"]
    assert {(device, threads) for _, device, threads, _ in found.values()} == {("cpu", 1)}
    assert os.getpid() not in {pid for *_, pid in found.values()}


def test_closing_an_engine_ends_its_processes(forked):
    with process_engine("cpu") as engine:
        ((_, (*_, pid)),) = engine.map(process_tasks.describe, "a")
        assert lives(pid)
    assert ends(pid)


def test_tasks_are_drawn_when_a_process_is_free(forked):
    drawn = []

    def tasks():
        for letter in "abc":
            drawn.append(letter)
            yield letter

    with process_engine("cpu") as engine:
        results = engine.map(process_tasks.describe, tasks())
        assert next(results)[1][0] == "a"
        assert drawn == ["a"]
        assert [result[0] for _, result in results] == ["b", "c"]


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (
            "exit",
            ResourceError,
            rf"a worker was ended with exit code 3 \(it broke\), {ATTEMPTS} times in the same task",
        ),
        ("raise", InvalidInputError, "the reference cannot"),
        ("defect", ZeroDivisionError, "by zero"),
    ],
)
def test_a_task_that_fails_ends_all_processes(forked, task, error, message):
    pids = []
    with process_engine("cpu", "cpu") as engine, pytest.raises(error, match=message):
        for _ in engine.map(process_tasks.end, ["sleep", task], on_message=pids.append):
            pass
    assert all(ends(pid) for pid in pids)


def test_the_task_of_a_dead_worker_is_given_to_another_and_recorded(forked, tmp_path, caplog):
    tasks = [(None, "a"), (tmp_path / "killed", "b"), (None, "c")]
    with process_engine("cpu", "cpu") as engine:
        results = dict(engine.map(process_tasks.end_once, tasks))
        assert [results[index][0] for index in range(3)] == ["a", "b", "c"]
        assert engine.retries == [Retry(task=1, cause="a worker was ended by signal SIGKILL, often for lack of memory")]
        assert "its task is given to another worker" in caplog.text
        assert len(dict(engine.map(process_tasks.describe, "abc"))) == 3, "the engine has all its workers again"


def test_a_worker_that_dies_while_it_waits_is_replaced(forked, caplog):
    with contextlib.closing(ProcessEngine(["cpu"])) as engine:
        ((_, (_, _, _, pid)),) = engine.map(process_tasks.describe, "a")
        os.kill(pid, signal.SIGKILL)
        assert ends(pid)
        time.sleep(0.5)  # the pool notices
        ((index, (task, _, _, other)),) = engine.map(process_tasks.describe, "b")
    assert (index, task) == (0, "b")
    assert other != pid
    assert [retry.cause for retry in engine.retries] == [
        "a worker was ended by signal SIGKILL, often for lack of memory"
    ]


@pytest.mark.slow
def test_a_worker_that_dies_as_it_starts_is_started_again(tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dies_once.py").write_text(
        "import os, pathlib, signal\n"
        "mark = pathlib.Path(__file__).with_name('died')\n"
        "if not mark.exists():\n"
        "    mark.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with contextlib.closing(ProcessEngine(["cpu"], modules=["dies_once"])) as engine:
        ((_, (task, *_)),) = engine.map(process_tasks.describe, "a")
    assert task == "a"
    assert "by signal SIGKILL, often for lack of memory while it started; another one is started" in caplog.text
    assert engine.retries == [], "no task was lost"


def test_a_result_cut_off_by_the_death_of_its_worker_is_computed_again(forked, tmp_path):
    with process_engine("cpu") as engine:
        assert list(engine.map(process_tasks.cut_off_once, [tmp_path / "cut off"])) == [(0, "whole")]
    assert [retry.task for retry in engine.retries] == [0]


def test_workers_are_deaf_to_interrupts_from_their_first_moment(two_workers):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with processes._as_worker():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "a process inherits it"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    for _, (*_, pid) in two_workers.map(process_tasks.describe, "ab"):
        status = Path(f"/proc/{pid}/status").read_text()
        blocked = int(re.search(r"SigBlk:\s*(\w+)", status)[1], 16)
        assert blocked >> (signal.SIGINT - 1) & 1


def test_progress_bars_of_workers_make_no_semaphore_that_outlives_them(two_workers):
    assert {name for _, name in two_workers.map(process_tasks.lock_of_progress_bars, "ab")} == {"RLock"}


def test_an_error_that_cannot_be_pickled_is_sent_as_text(monkeypatch):
    class OddError(Exception):
        def __init__(self, first, second):
            super().__init__(f"{first} and {second}")

    class Loop:
        def run(self, sealed, token, task):
            raise OddError("this", "that")

    monkeypatch.setattr(processes, "_loop", Loop())
    with pytest.raises(S2QError, match="^OddError: this and that$") as caught:
        processes._call(None, 0, "a")
    assert isinstance(caught.value.__cause__, OddError)
    assert type(workers.sendable(InvalidInputError("refused"))) is InvalidInputError


def test_workers_that_started_end_when_another_cannot_start():
    class Slot:
        alive = False

        def start(self):
            if started:
                raise OSError("too many open files")
            started.append(self)
            self.alive = True

        def kill(self):
            self.alive = False

    started = []
    with pytest.raises(OSError, match="too many open files"):
        WorkerEngine(["cpu", "cpu"], [Slot(), Slot()])
    assert [slot.alive for slot in started] == [False]


def test_closing_the_generator_ends_the_processes(forked):
    pids = []

    class EnoughError(Exception):
        pass

    def stop(pid):
        pids.append(pid)
        raise EnoughError

    with process_engine("cpu") as engine, pytest.raises(EnoughError):
        next(engine.map(process_tasks.end, ["sleep"], on_message=stop))
    assert ends(pids[0])


def test_processes_end_when_their_parent_is_killed_and_a_script_needs_no_guard():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import process_tasks\n"
        "from s2q.engines.processes import ProcessEngine\n"
        "say = lambda pid: print(pid, flush=True)\n"
        "list(ProcessEngine(['cpu']).map(process_tasks.end, ['sleep'], on_message=say))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert lives(pid)
    parent.kill()
    parent.wait()
    assert ends(pid)


def test_work_that_a_process_cannot_load_is_named(forked, monkeypatch):
    class Mine:
        def __call__(self, task, worker): ...

    Mine.__qualname__ = "Mine"
    monkeypatch.setattr(process_tasks, "Mine", Mine, raising=False)
    Mine.__module__ = "process_tasks"
    message = r"a worker cannot load its work \(.*'Mine'.*define it in a module that can be imported.*or use one worker"
    with process_engine("cpu") as engine, pytest.raises(S2QError, match=message):
        list(engine.map(Mine(), "a"))


@pytest.mark.parametrize(("device", "expected"), [("cpu", ["one thread"]), ("cuda:1", ["cuda:1"])])
def test_a_worker_makes_its_device_the_current_one(monkeypatch, device, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: chosen.append("one thread"))
    monkeypatch.setattr(workers, "LOGGER", logging.Logger("none"))
    workers.prepare(device, lambda message: None, logging.INFO)
    assert chosen == expected


def test_a_process_that_dies_ends_the_run_of_its_own_thread_only(forked):
    def run(tasks):
        with process_engine("cpu") as engine:
            return [result for _, result in engine.map(process_tasks.end_or_wait, tasks)]

    with ThreadPoolExecutor(2) as threads:
        lasting, broken = (threads.submit(run, tasks) for tasks in (["wait", "wait"], ["kill"]))
        with pytest.raises(ResourceError, match="SIGKILL"):
            broken.result()
        assert lasting.result() == ["waited", "waited"]


def test_work_is_sent_once_and_what_it_keeps_outlives_it(two_workers):
    counts = [count for _, count in two_workers.map(process_tasks.Counter(), "abcde")]
    assert max(counts) >= 3, "one of two workers counts three of five tasks"
    first, second = (dict(two_workers.map(process_tasks.kept, "abcd")).values() for _ in range(2))
    by_process = {pid: value for value, pid in first}
    assert all(by_process.get(pid, value) == value for value, pid in second)


@pytest.mark.parametrize("where", ["here", "processes"])
def test_work_is_closed_before_other_work_takes_its_place(where, tmp_path, two_workers):
    engine = two_workers if where == "processes" else InProcessEngine("cpu")
    assert not any(closed for _, closed in engine.map(process_tasks.Closing(tmp_path / "closed"), "abcd"))
    list(engine.map(process_tasks.Counter(), "abcd"))
    assert (tmp_path / "closed").exists()


def test_this_process_uses_what_is_offered():
    engine = InProcessEngine("cpu")
    engine.offer("loaded", "the model")
    assert dict(engine.map(process_tasks.kept, "ab")) == {0: ("the model", os.getpid()), 1: ("the model", os.getpid())}
    engine.close()
    assert next(engine.map(process_tasks.kept, "a"))[1][0] != "the model"


def test_one_thread_is_used_on_a_cpu_and_the_callers_number_restored():
    torch.set_num_threads(2)
    try:
        with fixed_threads("cpu"):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with fixed_threads("cuda"):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
