"""The simulation of runs on many workers does what the engine, the block runner and the measured run do."""

import heapq
import json
import random
from dataclasses import replace

import block_times
import pytest
import scaling
from scaling import Block, BlockWork, Clock, Costs, costs_of_run, scaled, simulate

from s2q.calibration.stream import TeacherStream
from s2q.engines.engine import Worker
from s2q.models import FAMILIES
from s2q.models.synthetic import synthetic_model
from s2q.recipes.load import load_recipe

TIMES, BENCH = (json.loads(path.read_text()) for path in (scaling.TIMES, scaling.BENCH))
RESULTS = json.loads(scaling.RESULT.read_text())


def random_costs(seed, *, stream=0.0):
    generator = random.Random(seed)
    numbers = [generator.uniform(0.1, 5) for _ in range(generator.randint(1, 40))]
    return Costs(
        prompts=tuple(generator.uniform(0.1, 2) for _ in range(generator.randint(1, 12))),
        transformers=(tuple(Block(quantize=number, stream=stream) for number in numbers),),
    )


def list_scheduling(tasks, workers):
    """The time in which workers finish tasks of which each free worker takes the next one."""
    ends = [0.0] * workers
    for task in tasks:
        heapq.heapreplace(ends, ends[0] + task)
    return max(ends)


def quantizing(costs):
    return [block.quantize for blocks in costs.transformers for block in blocks]


@pytest.mark.parametrize("seed", range(5))
def test_one_worker_takes_the_sum_of_all_parts(seed):
    costs = replace(
        random_costs(seed, stream=0.5),
        start=100.0,
        load=3.0,
        before=1.0,
        select=0.25,
        stream_start=2.0,
        hashes=0.5,
        after=4.0,
    )
    passes = 0.5 * (len(quantizing(costs)) - 1)
    expected = sum(costs.prompts) + sum(quantizing(costs)) + passes + 3 + 1 + 0.25 + 2 + 0.5 + 4
    assert simulate(costs, 1).seconds == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("workers", [2, 3, 8, 64])
def test_blocks_without_a_stream_take_the_time_of_list_scheduling(seed, workers):
    costs = random_costs(seed)
    workers = min(workers, len(quantizing(costs)))
    stages = simulate(costs, workers).stages
    assert stages["collect"] == pytest.approx(list_scheduling(costs.prompts, workers))
    assert stages["blocks"] == pytest.approx(list_scheduling(quantizing(costs), workers))


def test_workers_pass_their_stream_through_blocks_that_others_claim():
    blocks = tuple(Block(quantize=quantize, stream=1.0) for quantize in (4.0, 10.0, 2.0, 5.0))
    simulation = simulate(Costs(prompts=(1.0,), transformers=(blocks,), stream_start=0.5), 2)
    # First worker: block 0 until 4.5; block 2 after two passes until 8.5; block 3 after one pass until 14.5.
    # Second worker: block 1 after a start and a pass until 11.5.
    assert simulation.stages["blocks"] == pytest.approx(14.5)
    first, second, *rest = [worker for worker, task in simulation.claims if isinstance(task, tuple)]
    assert rest == [first, first]
    assert second != first


def test_every_worker_loads_the_model_once_with_its_first_task_while_the_first_process_starts_none():
    costs = Costs(start=3.0, load=10.0, prompts=(1.0, 1.0), transformers=((Block(quantize=5.0, stream=0.0),) * 2,))
    stages = simulate(costs, 2).stages
    assert stages == {"load": 10.0, "collect": 11.0, "select": 0.0, "blocks": 5.0, "assemble": 0.0}
    assert simulate(costs, 1).seconds == pytest.approx(10 + 2 + 10)


def test_more_workers_than_blocks_are_not_used():
    costs = Costs(prompts=(1.0,) * 6, transformers=((Block(quantize=1.0, stream=0.0),) * 3,))
    assert simulate(costs, 1000).stages["collect"] == 2.0


@pytest.mark.parametrize("claims", [[0, 1, 2, 3], [0, 3, 5], [2, 4, 5], [3, 1, 2], [0, 0]])
def test_the_stream_of_a_simulated_worker_moves_as_that_of_a_block_runner(claims, monkeypatch, tmp_path):
    moves = []

    def start(stream, block):
        moves.append("start")
        stream._position = block

    monkeypatch.setattr(TeacherStream, "_start", start)
    monkeypatch.setattr(TeacherStream, "_pass", lambda stream: moves.append(stream._position))
    names = [f"blocks.{index}" for index in range(6)]
    stream = TeacherStream(
        None, names, calls=[], names=[], steps=[], family=FAMILIES["WanTransformer3DModel"], folder=tmp_path
    )
    blocks = tuple(Block(quantize=0.0, stream=10.0**index) for index in range(6))
    costs = Costs(prompts=(), transformers=(blocks,), stream_start=0.5)
    work, worker = BlockWork(costs=costs, clock=Clock(), claims=[]), Worker(device="cpu", tell=print)
    for index in claims:
        moves.clear()
        stream.advance(index)
        expected = sum(0.5 if move == "start" else 10.0**move for move in moves)
        assert work.seconds((0, index), worker) == pytest.approx(expected)


def test_another_transformer_has_a_stream_of_its_own():
    blocks = (Block(quantize=0.0, stream=1.0),) * 3
    costs = Costs(prompts=(), transformers=(blocks, blocks), stream_start=0.5)
    work, worker = BlockWork(costs=costs, clock=Clock(), claims=[]), Worker(device="cpu", tell=print)
    assert [work.seconds(place, worker) for place in ((0, 1), (0, 2), (1, 2))] == [1.5, 1.0, 2.5]


@pytest.mark.parametrize("run", TIMES["runs"], ids=lambda run: run["model"])
def test_one_worker_takes_the_time_of_the_measured_run(run):
    assert simulate(costs_of_run(run), 1).seconds == pytest.approx(run["seconds"] + sum(run["save"]), rel=1e-4)


def test_the_measured_parts_of_a_run_are_all_of_it(embedded_tiny):
    small = ("calibration.n_prompts=2", "calibration.samples=2", "calibration.steps=2", "distillation.epochs=1")
    run = block_times.measure_run(embedded_tiny, overrides=small)
    costs = costs_of_run({**run, "worker_start": 4.0})
    assert simulate(costs, 1).seconds == pytest.approx(run["seconds"] + sum(run["save"]), rel=1e-3)
    assert len(costs.prompts) == 2
    assert all(block.quantize > 0 for block in costs.transformers[0])
    assert min(costs.before, costs.select, costs.hashes, costs.after) >= 0


def test_equal_blocks_reach_the_bound_at_a_worker_for_each():
    blocks = (Block(quantize=10.0, stream=0.0),) * 6
    result = scaled(Costs(prompts=(1.0,) * 3, transformers=(blocks,)))
    assert (result["bound"], result["nothing_gained_from"]) == (pytest.approx(63 / 11, rel=1e-5), 6)
    assert result["most_workers_at_half"] == 6


def test_operations_of_a_pass_are_those_of_its_linears_and_attention():
    model = synthetic_model("cogvideox-2b")
    width, tokens = 30 * 64, 13 * 30 * 45 + 226
    modulation = 2 * 6 * 512 * width
    expected = 12 * width**2 * tokens + 2 * tokens**2 * width + modulation
    assert scaling.pass_operations(model, model.block_lists[0]) == pytest.approx(expected)


def test_the_results_file_is_what_the_measured_times_give():
    expected = json.loads(json.dumps(scaling.results(TIMES, BENCH, sizes=("hunyuanvideo",))))
    rows = [row for row in RESULTS["models"] if row["model"] == "hunyuanvideo"]
    assert {**{name: RESULTS[name] for name in expected}, "models": rows} == expected
    assert {row["model"] for row in RESULTS["models"]} == set(scaling.SIZES)


def test_hunyuanvideo_reaches_nine_tenths_on_eight_workers_with_prompts_for_all_of_them():
    (row,) = (
        row
        for row in RESULTS["models"]
        if (row["model"], row["step_is"], row["prompts"]) == ("hunyuanvideo", "measured", 16)
    )
    assert row["speedup"]["8"] >= 0.9 * 8


def test_the_epochs_and_samples_of_a_size_are_those_of_the_recipe():
    model, recipe = synthetic_model("wan-1.3b"), load_recipe(scaling.RECIPE)
    costs = scaling.costs_of_size(model, recipe, operations={"blocks": 7.0}, step=10.0, prompts=4)
    assert sum(quantizing(costs)) == pytest.approx(40 * (15 * 10 + 5 + scaling.LOSSES))
    assert sum(block.stream for block in costs.transformers[0]) == pytest.approx(40)
    assert costs.prompts == (50 * 2,) * 4
