"""Simulate a run of `s2q quantize` on 1 to 256 workers, from measured times; write results/scaling.json.

    python benchmarks/scaling.py

Tasks are given out by the engine itself (`s2q.engines.engine`) on a simulated clock: a task takes the time that its
parts take, and a worker that claims a block first passes its own stream through the blocks before it. The times of an
embedded model are those of a run (`block_times.py`). Published sizes are in units of one full-precision pass of one
sample through the transformer, from operation counts; the time of a distillation step in passes is measured on a block
(`s2q bench --ops calibration_block`), or its lower bound by operations.
"""

import heapq
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from environment import environment
from records import rounded, write_record

from s2q.distillation.options import evaluations
from s2q.engines import engine as engines
from s2q.engines.engine import Engine, InProcessEngine, Worker, WorkerEngine
from s2q.models.family import linears_of_block
from s2q.models.synthetic import BlockList, SyntheticModel, synthetic_model, synthetic_names
from s2q.recipes.load import load_recipe
from s2q.recipes.schema import Recipe

RECIPE = "s2q-w4a6"
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STEPS = 50
"""Denoising steps of a calibration prompt, as the published pipelines have them."""
PROMPTS = (10, 16)
"""The recipe's own number of prompts, and one for which eight workers take as long."""
OPERATIONS = 3.0
"""Passes that a step takes at least: forward, and twice that backward."""
MEASURED_ON = "synthetic:cogvideox-2b"
"""The published size whose step was measured."""
TRANSFORMERS = {"wan-2.2-a14b": ("wan-14b", 2)}
"""Published pipelines with several transformers of one size."""
SIZES = tuple(sorted({*(name for name in synthetic_names() if synthetic_model(name).transformers == 1), *TRANSFORMERS}))
LOSSES = 3
"""Evaluations of all samples besides those of distillation: rounded to nearest, at the start, at the end. Each is
counted as one pass per sample, its lower bound."""
MODEL = "model"
RESULTS = Path(__file__).parent / "results"
TIMES, RESULT = RESULTS / "block-times.json", RESULTS / "scaling.json"
BENCH = RESULTS / "bench" / "cpu-one-thread.json"


@dataclass(frozen=True, kw_only=True)
class Block:
    """Seconds of a block: quantizing it, and passing the stream through it."""

    quantize: float
    stream: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds, or any one unit, of the parts of a run.

    Attributes:
        start: A worker imports what it needs.
        load: A process reads the model; the first of a run and every worker do.
        before: Between load and collect, in the first process: checks and hashes.
        prompts: Collecting each prompt.
        select: Scores and selection, in the first process.
        transformers: The blocks of each transformer.
        stream_start: Running a transformer until its first block, for all samples.
        chained: Whether the inputs of a block are what the one before returned; else a transformer runs up to each.
        hashes: Hashing all blocks, in the first process.
        after: Assembling and writing the checkpoint, in the first process.
    """

    start: float = 0.0
    load: float = 0.0
    before: float = 0.0
    prompts: tuple[float, ...]
    select: float = 0.0
    transformers: tuple[tuple[Block, ...], ...]
    stream_start: float = 0.0
    chained: bool = True
    hashes: float = 0.0
    after: float = 0.0


class Clock:
    """Simulated time: futures that end at a time, and a `concurrent.futures.wait` that waits for none."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._due: list[tuple[float, int, Future[Any], Any]] = []

    def after(self, seconds: float, result: Any = None) -> Future[Any]:
        """Return a future that ends so much later."""
        future: Future[Any] = Future()
        heapq.heappush(self._due, (self.now + seconds, next(self._order), future, result))
        return future

    def wait(self, futures: Sequence[Future[Any]], **options: Any) -> tuple[list[Future[Any]], list[Future[Any]]]:
        """Advance to the end of the first of the futures; return those that have ended then, in order."""
        ended = [future for future in futures if future.done()]
        while not ended or (self._due and self._due[0][0] <= self.now):
            time, _, future, result = heapq.heappop(self._due)
            self.now = max(self.now, time)
            future.set_result(result)
            ended += [future] if future in futures else []
        return ended, [future for future in futures if not future.done()]


class Slot:
    """A worker of `WorkerEngine` on a simulated clock."""

    def __init__(self, clock: Clock, start: float) -> None:
        self.clock, self.seconds = clock, start
        self.worker = Worker(device="cpu", tell=lambda message: None)
        self._token, self._work = 0, None

    def start(self) -> Future[Any]:
        """See `engines.Slot`."""
        return self.clock.after(self.seconds)

    def submit(self, work: Any, token: int, task: Any) -> Future[Any]:
        """See `engines.Slot`; a worker has its own copy of the work."""
        if token != self._token:
            self._token, self._work = token, replace(work)
        assert self._work is not None
        return self.clock.after(self._work.seconds(task, self.worker))

    def messages(self) -> Iterator[Any]:
        """See `engines.Slot`."""
        return iter(())

    def kill(self) -> None:
        """See `engines.Slot`."""


@dataclass(kw_only=True)
class Work:
    """Work whose tasks take the time that they cost, in this process or in a worker."""

    costs: Costs
    clock: Clock
    claims: list[tuple[int, Any]]

    def __call__(self, task: Any, worker: Worker) -> None:
        """Take the time of a task in this process."""
        self.clock.now += self.seconds(task, worker)

    def seconds(self, task: Any, worker: Worker) -> float:
        """Return the time of a task of a worker, with the model if it is the worker's first."""
        self.claims.append((id(worker), task))
        loaded: list[float] = []
        worker.keep(MODEL, lambda: loaded.append(self.costs.load))
        return sum(loaded) + self.own_seconds(task)

    def own_seconds(self, task: Any) -> float:
        """Return the time of a task where the model is loaded."""
        raise NotImplementedError


class PromptWork(Work):
    """The work of `s2q.run.work.PromptWork`: a prompt by its index."""

    def own_seconds(self, task: int) -> float:
        """See `Work`."""
        return self.costs.prompts[task]


@dataclass(kw_only=True)
class BlockWork(Work):
    """The work of `s2q.run.work.BlockWork`, with the stream of `BlockRunner`: a transformer and a block of it."""

    position: tuple[int, int] | None = None

    def own_seconds(self, task: tuple[int, int]) -> float:
        """See `Work`."""
        transformer, index = task
        seconds, first = 0.0, 0
        is_behind = self.position is not None and self.position[0] == transformer and self.position[1] <= index
        if is_behind and self.costs.chained:
            first = self.position[1]
        else:
            seconds = self.costs.stream_start
        self.position = task
        blocks = self.costs.transformers[transformer]
        return seconds + sum(block.stream for block in blocks[first:index]) + blocks[index].quantize


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Seconds of the stages of a run; `claims` has a worker and its task for each task, in order."""

    stages: Mapping[str, float]
    claims: Sequence[tuple[int, Any]]

    @property
    def seconds(self) -> float:
        """Seconds of the run."""
        return math.fsum(self.stages.values())


def simulate(costs: Costs, workers: int) -> Simulation:
    """Return the times of a run; `workers` is limited by the number of blocks, as `Workers.planned` does."""
    clock, stages = Clock(), dict[str, float]()
    claims: list[tuple[int, Any]] = []
    places = [(index, block) for index, blocks in enumerate(costs.transformers) for block in range(len(blocks))]
    workers = min(workers, len(places))

    def stage(name: str, serial: float, work: Work | None, tasks: Sequence[Any]) -> None:
        started = clock.now
        clock.now += serial
        if work is not None:
            for _ in engine.map(work, tasks):
                pass
        stages[name] = clock.now - started

    with mock.patch.object(engines, "wait", clock.wait):
        engine = _engine(costs, workers, clock)
        engine.offer(MODEL, None)
        stage("load", costs.load + costs.before, None, ())
        stage("collect", 0.0, PromptWork(costs=costs, clock=clock, claims=claims), range(len(costs.prompts)))
        stage("select", costs.select, None, ())
        stage("blocks", costs.hashes, BlockWork(costs=costs, clock=clock, claims=claims), places)
        stage("assemble", costs.after, None, ())
    return Simulation(stages=stages, claims=claims)


def _engine(costs: Costs, workers: int, clock: Clock) -> Engine:
    if workers == 1:
        return InProcessEngine("cpu")
    return WorkerEngine(["cpu"] * workers, [Slot(clock, costs.start) for _ in range(workers)])


def costs_of_run(run: Mapping[str, Any]) -> Costs:
    """Return the costs of a run of one process that `block_times.py` has measured."""
    passes, stages = run["stream_passes"], run["stages"]
    (stream_start,) = run["stream_starts"]
    streamed = [stream_start, *passes]  # what the seconds of a block contain: the way from the block before
    blocks = tuple(
        Block(quantize=seconds - way, stream=stream)
        for seconds, way, stream in zip(run["blocks"], streamed, [*passes, 0.0], strict=True)
    )
    return Costs(
        start=run["worker_start"],
        load=stages["load"],
        before=run["seconds"] - sum(stages.values()),
        prompts=tuple(run["prompts"]),
        select=stages["select"] + stages["collect"] - sum(run["prompts"]),
        transformers=(blocks,),
        stream_start=stream_start,
        hashes=stages["blocks"] - sum(run["blocks"]),
        after=stages["assemble"] + sum(run["save"]),
    )


def pass_operations(model: SyntheticModel, block_list: BlockList) -> float:
    """Multiplications of one sample in a block of a list: linears and attention, for a video of the full size."""
    block, tokens = getattr(model.meta_transformer(blocks=1), block_list.name)[0], model.tokens
    linears = sum(
        linear.in_features * linear.out_features * model.rows(block_list, linear.inner_name, tokens=tokens)
        for linear in linears_of_block(block, f"{block_list.name}.0", model.family)
    )
    is_joint = len(model.family.joint_order) > 1
    keys = (tokens + model.text_tokens) ** 2 if is_joint else tokens * (tokens + model.text_tokens)
    return float(linears + 2 * keys * model.heads * model.head_dim)


def costs_of_size(
    model: SyntheticModel,
    recipe: Recipe,
    *,
    operations: Mapping[str, float],
    step: float,
    prompts: int,
    transformers: int = 1,
) -> Costs:
    """Return the costs of a published size, in passes of one sample through one transformer; a step takes `step`.

    Nothing measures at these sizes what the first process does by itself, and, of a block, observation, Hessians and
    GPTQ: they are not included.
    """
    assert recipe.distillation is not None
    samples, epochs = recipe.calibration.samples, recipe.distillation.epochs
    whole = sum(blocks.count * operations[blocks.name] for blocks in model.block_lists)
    listed = []
    for blocks in model.block_lists:
        share = operations[blocks.name] / whole
        learned = epochs * step + evaluations(epochs) + LOSSES
        listed += [Block(quantize=share * samples * learned, stream=share * samples)] * blocks.count
    return Costs(
        prompts=(float(STEPS * model.batch * model.calls),) * prompts,
        transformers=(tuple(listed),) * transformers,
        chained=model.family.chained,
    )


def measured_step(bench: Mapping[str, Any]) -> float:
    """Return the time of a step over that of a bf16 pass, as measured on a block of 1,024 tokens."""
    (row,) = (
        row
        for row in bench["results"]
        if (row["op"], row["model"], row["recipe"]) == ("calibration_block", MEASURED_ON, RECIPE)
    )
    return rounded(1 / row["ratio_to_bf16"])


def scaled(costs: Costs) -> dict[str, Any]:
    """Return time on 1 to 256 workers, its bound, and from how many workers on nothing is gained."""
    tasks = sum(map(len, costs.transformers))
    used = {workers: simulate(costs, workers) for workers in range(1, tasks + 1)}
    runs = {workers: used[min(workers, tasks)] for workers in range(1, max(WORKERS) + 1)}
    alone, best = runs[1].seconds, min(run.seconds for run in runs.values())
    speedups = {workers: alone / run.seconds for workers, run in runs.items()}
    return {
        "seconds": rounded(alone),
        "stages": {name: rounded(value) for name, value in runs[1].stages.items()},
        "speedup": {str(workers): rounded(speedups[workers]) for workers in WORKERS},
        "stages_speedup": {
            stage: {str(workers): rounded(runs[1].stages[stage] / runs[workers].stages[stage]) for workers in WORKERS}
            for stage in ("collect", "blocks")
        },
        "bound": rounded(alone / best),
        "nothing_gained_from": next(workers for workers, run in runs.items() if run.seconds <= best * (1 + 1e-9)),
        "most_workers_at_half": max(workers for workers in used if speedups[workers] >= workers / 2),
    }


def results(times: Mapping[str, Any], bench: Mapping[str, Any], *, sizes: Sequence[str] = SIZES) -> dict[str, Any]:
    """Return what scaling.json contains, except where it was made."""
    recipe, models, runs = load_recipe(RECIPE), [], []
    for run in times["runs"]:
        costs = costs_of_run(run)
        runs.append({"model": run["model"], "costs": asdict(costs), **scaled(costs)})
    steps = {"measured": measured_step(bench), "operations": OPERATIONS}
    for name in sizes:
        source, transformers = TRANSFORMERS.get(name, (name, 1))
        model = synthetic_model(source)
        operations = {blocks.name: pass_operations(model, blocks) for blocks in model.block_lists}
        for (kind, step), prompts in itertools.product(steps.items(), PROMPTS):
            costs = costs_of_size(
                model, recipe, operations=operations, step=step, prompts=prompts, transformers=transformers
            )
            models.append(
                {
                    "model": name,
                    "step": step,
                    "step_is": kind,
                    "prompts": prompts,
                    "samples": recipe.calibration.samples,
                    "blocks": sum(map(len, costs.transformers)),
                    **scaled(costs),
                }
            )
    measured = {key: bench[key] for key in ("hardware", "versions")}
    return {"recipe": RECIPE, "step_measured_on": {"model": MEASURED_ON, **measured}, "runs": runs, "models": models}


def main() -> None:
    """Simulate every run and size, write the file."""
    content = results(json.loads(TIMES.read_text()), json.loads(BENCH.read_text()))
    write_record(RESULT, {"schema_version": 1, **environment(), **content})
    for row in (*content["runs"], *content["models"]):
        words = [row["model"], row.get("step_is", "a run"), row.get("prompts", "")]
        print(*words, {key: round(value, 2) for key, value in row["speedup"].items()}, row["nothing_gained_from"])


if __name__ == "__main__":
    main()
