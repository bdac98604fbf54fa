import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import process_tasks
from s2q.common.errors import InvalidInputError, S2QError
from s2q.engines import processes
from s2q.engines.processes import (
    ProcessEngine,
    cpu_count,
    devices_of,
    most_on_one_device,
)


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


def test_results_messages_and_logs_come_from_every_task(caplog):
    messages = []
    found = dict(ProcessEngine(["cpu", "cpu"]).map(process_tasks.describe, "abcde", on_message=messages.append))
    assert [found[index][0] for index in range(5)] == list("abcde")
    assert sorted(messages) == [("started", letter) for letter in "abcde"]
    assert sorted(caplog.messages) == [f"task {letter}" for letter in "abcde"]
    assert {(device, threads) for _, device, threads, _ in found.values()} == {("cpu", 1)}
    assert os.getpid() not in {pid for *_, pid in found.values()}
    assert all(ends(pid) for *_, pid in found.values())


def test_tasks_are_drawn_when_a_process_is_free():
    drawn = []

    def tasks():
        for letter in "abc":
            drawn.append(letter)
            yield letter

    results = ProcessEngine(["cpu"]).map(process_tasks.describe, tasks())
    assert next(results)[1][0] == "a"
    assert drawn == ["a"]
    assert [result[0] for _, result in results] == ["b", "c"]


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("exit", S2QError, r"a process was ended with exit code 3 \(it broke\); run the same command again"),
        ("kill", S2QError, "was ended by signal SIGKILL, often for lack of memory"),
        ("raise", InvalidInputError, "the reference cannot"),
        ("defect", ZeroDivisionError, "by zero"),
    ],
)
def test_a_task_that_fails_ends_all_processes(task, error, message):
    pids = []

    with pytest.raises(error, match=message):
        for _ in ProcessEngine(["cpu", "cpu"]).map(process_tasks.end, ["sleep", task], on_message=pids.append):
            pass
    assert all(ends(pid) for pid in pids)


def test_closing_the_generator_ends_the_processes():
    pids = []

    class EnoughError(Exception):
        pass

    def stop(pid):
        pids.append(pid)
        raise EnoughError

    with (
        pytest.raises(EnoughError),
        contextlib.closing(ProcessEngine(["cpu"]).map(process_tasks.end, ["sleep"], on_message=stop)) as results,
    ):
        next(results)
    assert ends(pids[0])


def test_processes_end_when_their_parent_is_killed():
    code = (
        "import sys; sys.path.insert(0, 'tests'); import process_tasks\n"
        "from s2q.engines.processes import ProcessEngine\n"
        "if __name__ == '__main__':\n"
        "    say = lambda pid: print(pid, flush=True)\n"
        "    list(ProcessEngine(['cpu']).map(process_tasks.end, ['sleep'], on_message=say))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert lives(pid)
    parent.kill()
    parent.wait()
    assert ends(pid)


def test_work_that_a_process_cannot_load_is_named():
    code = (
        "from s2q.engines.processes import ProcessEngine\n"
        "class Mine:\n"
        "    def __call__(self, task, device, tell): ...\n"
        "if __name__ == '__main__':\n"
        "    list(ProcessEngine(['cpu', 'cpu']).map(Mine(), 'ab'))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message = ran.stderr.splitlines()[-1]
    assert "a process cannot load its work (Can't get attribute 'Mine' on <module '__main__'" in message
    assert message.endswith("define it in a module that can be imported, not in a notebook, or use one process")


def test_gpus_take_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("cuda", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices_of("cuda:1", 2) == ["cuda:1", "cuda:1"]
    assert devices_of("cpu", 2) == ["cpu", "cpu"]
    assert [most_on_one_device(device, 3) for device in ("cuda", "cuda:1", "cpu")] == [2, 3, 3]


def test_cpu_count_is_what_this_process_may_use():
    assert cpu_count() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("device", "expected"), [("cpu", ["one thread"]), ("cuda:1", ["cuda:1"])])
def test_a_process_makes_its_device_the_current_one(monkeypatch, device, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: chosen.append("one thread"))
    processes._use(device)
    assert chosen == expected


def test_a_process_that_dies_ends_the_run_of_its_own_thread_only():
    def run(tasks):
        return [result for _, result in ProcessEngine(["cpu"]).map(process_tasks.end_or_wait, tasks)]

    with ThreadPoolExecutor(2) as threads:
        lasting, broken = (threads.submit(run, tasks) for tasks in (["wait", "wait"], ["kill"]))
        with pytest.raises(S2QError, match="SIGKILL"):
            broken.result()
        assert lasting.result() == ["waited", "waited"]


def test_work_is_sent_to_a_process_once():
    counts = ProcessEngine(["cpu"]).map(process_tasks.Counter(), "abc")
    assert [count for _, count in counts] == [1, 2, 3]
