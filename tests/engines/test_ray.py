"""Engines and runs on a Ray cluster of two nodes on this machine; Ray's own start takes some seconds, once."""

import contextlib
import os
import socket
from concurrent.futures import Future
from pathlib import Path

import pytest

import killed_work
import process_tasks
from s2q.common.errors import InvalidInputError, ResourceError, S2QError, UsageError
from s2q.engines import ray_cluster
from s2q.engines.options import Workers, workers_argument
from s2q.run.quantize import quantize
from tiny import tiny_pipeline

ray = pytest.importorskip("ray")

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SMALL = ("calibration.n_prompts=2", "calibration.samples=2", "calibration.steps=2", "distillation.epochs=1")
PROMPTS = ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def cluster():
    """A head without cores, so that workers are on the two other nodes."""
    from ray.cluster_utils import Cluster

    here = Path(__file__).parents[1]
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), before])
    os.environ["RAY_DEDUP_LOGS"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()
    os.environ["PYTHONPATH"] = before


def joined(cluster, workers="auto"):
    return workers_argument(workers=workers, devices=None, device="cpu", engine="ray", ray_address=cluster[0].address)


@pytest.fixture(scope="module")
def engine(cluster):
    where = joined(cluster)
    assert where.planned(9) == 4
    assert where.on_one_machine(3) == 2
    with contextlib.closing(where.open(2)) as engine:
        yield engine


def test_results_messages_and_logs_come_from_every_task(engine, caplog):
    messages = []
    results = dict(engine.map(process_tasks.describe, "abcde", on_message=messages.append))
    assert [results[index][0] for index in range(5)] == list("abcde")
    assert sorted(messages) == [("started", letter) for letter in "abcde"]
    told = [message for message in caplog.messages if not message.startswith("waiting for the Ray cluster")]
    assert sorted(told) == [f"task {letter}" for letter in "abcde"]  # a busy machine starts workers late
    assert {(device, threads) for _, device, threads, _ in results.values()} == {("cpu", 1)}
    assert os.getpid() not in {pid for *_, pid in results.values()}


def test_messages_arrive_while_a_task_runs(engine, tmp_path):
    task = tmp_path / "told"
    assert list(engine.map(process_tasks.wait_for, [task], on_message=lambda message: task.touch())) == [(0, None)]


def test_a_worker_of_a_numbered_gpu_takes_the_one_that_ray_assigns(engine, monkeypatch):
    monkeypatch.setattr(ray_cluster._RaySlot, "start", lambda slot: Future())
    assert ray_cluster.RayEngine("cuda:1", 2).devices == ["cuda", "cuda"]


@pytest.mark.slow
def test_a_node_without_packages_is_named_and_not_tried_again(engine, monkeypatch):
    monkeypatch.setattr(ray_cluster, "_Actor", process_tasks.BrokenActor)
    message = r"a worker of the Ray cluster failed \(ModuleNotFoundError: No module named 'diffusers'\); check that"
    with contextlib.closing(ray_cluster.RayEngine("cpu", 1)) as broken, pytest.raises(S2QError, match=message):
        list(broken.map(process_tasks.describe, "a"))


def test_a_cluster_without_room_is_refused(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    assert Workers(engine="ray").planned(9) == 4
    with pytest.raises(ResourceError, match="no node of the cluster has a GPU; give --workers N if nodes join later"):
        Workers(engine="ray", devices=("cuda",)).planned(9)
    assert Workers(engine="ray", devices=("cuda",), count=3).planned(9) == 3


def test_an_address_where_something_else_answers_is_refused_in_time(monkeypatch):
    monkeypatch.setattr(ray_cluster, "_ANSWER_SECONDS", 3.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(ResourceError, match="no Ray cluster answers; start one with `ray start --head`"):
            ray_cluster.connect(f"127.0.0.1:{server.getsockname()[1]}")


def test_a_second_cluster_in_a_program_is_refused(cluster, monkeypatch):
    ray_cluster.connect(cluster[0].address)
    ray_cluster.connect("auto")
    with monkeypatch.context() as patch:  # Ray turns localhost into the address of the node
        patch.setattr(ray_cluster, "_are_same", lambda address, other: False)
        ray_cluster.connect(cluster[0].address)
    with pytest.raises(UsageError, match=r"--ray-address 127.0.0.2:1: this program has joined \S+; use one cluster"):
        ray_cluster.connect("127.0.0.2:1")


def test_the_task_of_a_dead_worker_is_given_to_another_and_recorded(engine, tmp_path):
    tasks = [(None, "a"), (tmp_path / "killed", "b"), (None, "c")]
    results = dict(engine.map(process_tasks.end_once, tasks))
    assert [results[index][0] for index in range(3)] == ["a", "b", "c"]
    assert [retry.task for retry in engine.retries] == [1]
    assert engine.retries[0].cause.startswith("a worker of the Ray cluster was lost (")
    assert len(engine.retries[0].cause) < 300


@pytest.mark.slow
def test_the_error_of_a_task_is_that_of_the_run(cluster):
    with contextlib.closing(joined(cluster).open(1)) as engine:
        with pytest.raises(InvalidInputError, match=r"^the reference cannot$"):
            list(engine.map(process_tasks.end, ["raise"]))


def test_a_node_that_does_not_see_the_run_folder_is_refused(cluster, tmp_path):
    message = "does not see .*elsewhere; put the output on storage that all nodes mount"
    with contextlib.closing(joined(cluster).open(1, shared=tmp_path / "elsewhere")) as engine:
        with pytest.raises(InvalidInputError, match=message):
            list(engine.map(process_tasks.describe, "a"))


@pytest.mark.slow
def test_relative_paths_mean_the_same_in_workers(cluster, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(joined(cluster).open(1, shared=Path("out"))) as engine:
        assert list(engine.map(process_tasks.exists_here, ["out", "elsewhere"])) == [(0, True), (1, False)]


def test_a_node_with_other_versions_is_refused(cluster, monkeypatch):
    monkeypatch.setattr(ray_cluster, "package_versions", lambda: {"s2q": "9.9", "torch": "1.0"})
    with contextlib.closing(joined(cluster).open(1)) as engine:
        with pytest.raises(
            InvalidInputError, match=r"has other versions: s2q 0\.\S+ \(here 9\.9\), torch .*install the"
        ):
            list(engine.map(process_tasks.describe, "a"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    tiny_pipeline("cogvideox").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    quantize(model, recipe="s2q-w4a6", out=out, prompts=PROMPTS, overrides=SMALL)
    return (out / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_worker_that_dies_inside_a_block_is_in_the_report(cluster, model, tmp_path, monkeypatch):
    monkeypatch.setattr("s2q.run.stages.BlockWork", killed_work.KilledOnce)
    report = quantize(
        model, recipe="rtn-w4a8", out=tmp_path / "out", engine="ray", workers=1, ray_address=cluster[0].address
    )
    assert (tmp_path / "killed").exists()
    assert len(report.retries) == 1
    assert report.retries[0]["cause"].startswith("a worker of the Ray cluster was lost (")
    quantize(model, recipe="rtn-w4a8", out=tmp_path / "undisturbed")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "undisturbed" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_run_whose_node_is_killed_gives_the_bytes_of_another_run(cluster, model, undisturbed, tmp_path):
    """Last, since it takes a node away; another takes its place, as in a cluster that scales.

    Whether a block is retried depends on when the node dies; `test_a_worker_that_dies_inside_a_block_is_in_the_report`
    tests retries.
    """
    killed = []

    def progress(stage, done, total):
        if stage == "blocks" and done > 0 and not killed:
            killed.append(cluster[1][0])
            cluster[0].remove_node(killed[0], allow_graceful=False)
            cluster[0].add_node(num_cpus=2)

    report = quantize(
        model,
        recipe="s2q-w4a6",
        out=tmp_path / "out",
        prompts=PROMPTS,
        overrides=SMALL,
        engine="ray",
        workers=2,
        ray_address=cluster[0].address,
        progress=progress,
    )
    assert killed
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == undisturbed
    assert all(retry["cause"].startswith("a worker of the Ray cluster was lost (") for retry in report.retries)
    assert not list(tmp_path.glob(".*"))
