import io
import json
import os
import sys

import pytest
import torch

from s2q.comparing import worker
from s2q.comparing.shards import Shard
from s2q.core.errors import InvalidInputError


class Folder:
    def plan(self):
        return "the plan"


def test_a_worker_answers_every_order(monkeypatch):
    seen = []

    def evaluate(folder, plan, shard, *, device, reports):
        seen.append((plan, shard, device))
        reports.stepped()
        if shard.index == 1:
            raise InvalidInputError("the reference cannot")
        reports.failed("b", "not finite")

    monkeypatch.setattr(worker, "evaluate_shard", evaluate)
    answers = io.StringIO()
    orders = io.StringIO('{"index": 0, "labels": ["a", "b"]}\n{"index": 1, "labels": ["a"]}\n')
    worker.serve(Folder(), "cuda:1", orders=orders, answers=answers)
    assert seen == [
        ("the plan", Shard(index=0, labels=("a", "b")), "cuda:1"),
        ("the plan", Shard(index=1, labels=("a",)), "cuda:1"),
    ]
    assert [json.loads(line) for line in answers.getvalue().splitlines()] == [
        {"stepped": 1},
        {"failed": "b", "why": "not finite"},
        {"done": 0},
        {"stepped": 1},
        {"error": "InvalidInputError", "why": "the reference cannot"},
    ]


@pytest.mark.parametrize(("device", "expected"), [("cpu", []), ("cuda:1", ["cuda:1"])])
def test_a_worker_makes_its_device_the_current_one(monkeypatch, tmp_path, device, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(os, "dup2", lambda source, target: None)
    monkeypatch.setattr(worker, "serve", lambda folder, name, **streams: chosen.append("served"))
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path), device])
    worker.main()
    assert chosen == [*expected, "served"]
