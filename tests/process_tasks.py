"""Tasks for other processes: they are found there by the name of their module."""

import logging
import os
import signal
import struct
import sys
import time

import torch
from tqdm import tqdm

from s2q.common.errors import InvalidInputError


def describe(task, worker):
    worker.tell(("started", task))
    logging.getLogger("s2q.tasks").warning("task %s", task)
    return task, worker.device, torch.get_num_threads(), os.getpid()


def end(task, worker):
    """Each way in which a task can end a process or itself."""
    if task == "exit":
        sys.stderr.write("it broke\n")
        sys.stderr.flush()
        os._exit(3)
    if task == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise InvalidInputError("the reference cannot")
    if task == "defect":
        raise ZeroDivisionError("by zero")
    worker.tell(os.getpid())
    time.sleep(600)


def end_or_wait(task, worker):
    if task == "wait":
        time.sleep(2)
        return "waited"
    end(task, worker)


def cut_off_once(task, worker):
    """Kill the process in the middle of sending a result of a megabyte, the first time."""
    if not task.exists():
        task.touch()
        frame = sys._getframe()
        while "result_queue" not in frame.f_locals:
            frame = frame.f_back
        os.write(frame.f_locals["result_queue"]._writer.fileno(), struct.pack("!i", 1_000_000) + b"start")
        os.kill(os.getpid(), signal.SIGKILL)
    return "whole"


def wait_for(task, worker):
    """Tell that the task runs, and end when the caller has heard of it."""
    worker.tell("runs")
    deadline = time.monotonic() + 60
    while not task.exists():
        assert time.monotonic() < deadline, "the caller has no message"
        time.sleep(0.02)


def end_once(task, worker):
    """Kill the process of a task with a file, the first time."""
    file, task = task
    if file is not None and not file.exists():
        file.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task, os.getpid()


def lock_of_progress_bars(task, worker):
    return type(tqdm.get_lock()).__name__


def exists_here(task, worker):
    return os.path.exists(task)


def kept(task, worker):
    return worker.keep("loaded", lambda: os.urandom(4)), os.getpid()


class BrokenActor:
    """A worker of a Ray node that lacks packages."""

    def __init__(self, **options):
        raise ModuleNotFoundError("No module named 'diffusers'")

    def ready(self): ...

    def messages(self): ...


class Closing:
    """Work that says when it is closed."""

    def __init__(self, file):
        self.file = file

    def __call__(self, task, worker):
        return self.file.exists()

    def close(self):
        self.file.touch()


class Counter:
    """Work that keeps something from task to task."""

    def __init__(self):
        self.calls = 0

    def __call__(self, task, worker):
        self.calls += 1
        return self.calls
