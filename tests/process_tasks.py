"""Tasks for other processes: they are found there by the name of their module."""

import logging
import os
import signal
import sys
import time

import torch

from s2q.common.errors import InvalidInputError


def describe(task, device, tell):
    tell(("started", task))
    logging.getLogger("s2q.tasks").warning("task %s", task)
    return task, device, torch.get_num_threads(), os.getpid()


def end(task, device, tell):
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
    tell(os.getpid())
    time.sleep(600)


def end_or_wait(task, device, tell):
    if task == "wait":
        time.sleep(2)
        return "waited"
    end(task, device, tell)


class Counter:
    """Work that keeps something from task to task."""

    def __init__(self):
        self.calls = 0

    def __call__(self, task, device, tell):
        self.calls += 1
        return self.calls
