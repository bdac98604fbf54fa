"""Runs on Ray clusters of two and four nodes: undisturbed, with nodes killed, and with the whole cluster killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reliability import record

from faults.commands import ENVIRONMENT, hashes

pytest.importorskip("ray")
pytestmark = pytest.mark.faults
SECONDS = 300


class RayCluster:
    """A head without cores and nodes with one core each."""

    def __init__(self, nodes):
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(nodes)]

    @property
    def flags(self):
        return ["--engine", "ray", "--ray-address", self.cluster.address]

    def kill_node(self):
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def close(self):
        for node in (self.cluster.head_node, *self.nodes):
            node.kill_all_processes(check_alive=False, allow_graceful=False)


@pytest.fixture
def cluster_of():
    clusters = []

    def start(nodes):
        clusters.append(RayCluster(nodes))
        return clusters[-1]

    yield start
    for cluster in clusters:
        cluster.close()


def start(quantize_tiny, flags, out):
    """Start a run as a user does, with the workers of a cluster."""
    arguments = [part for part in quantize_tiny[:-1] if part not in ("--workers", "1")]
    command = [sys.executable, "-m", "s2q", *arguments, *flags, "-o", str(out)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_block(out):
    """Wait until a worker is in a block: its activations are in the run folder."""
    folder = Path(out).with_name(f".{Path(out).name}.s2q-run")
    deadline = time.monotonic() + SECONDS
    while not list(folder.glob("process-*")):
        assert time.monotonic() < deadline, "no block was begun"
        time.sleep(0.02)


def same(files, expected):
    """Whether checkpoints have equal files; the server of `commands` draws no selection."""
    drawn = "s2q/selection.png"
    return {**files, drawn: None} == {**expected, drawn: None}


def finish(process):
    output, errors = process.communicate(timeout=SECONDS)
    return process.returncode, output + errors


@pytest.mark.parametrize("nodes", [2, 4])
def test_a_cluster_gives_the_bytes_of_one_process(cluster_of, quantize_tiny, undisturbed, tmp_path, nodes):
    code, output = finish(start(quantize_tiny, cluster_of(nodes).flags, tmp_path / "out"))
    assert code == 0, output[-1500:]
    assert same(hashes(tmp_path / "out"), undisturbed[1])
    record(f"Ray, {nodes} nodes", {"runs": 1, "equal": 1})


def test_a_killed_node_changes_no_byte_and_is_in_the_report(cluster_of, quantize_tiny, undisturbed, tmp_path):
    cluster, out = cluster_of(3), tmp_path / "out"
    process = start(quantize_tiny, cluster.flags, out)
    wait_for_block(out)
    for _ in range(2):  # of three nodes, two workers for two blocks: at least one is in a block
        cluster.kill_node()
    code, output = finish(process)
    assert code == 0, output[-1500:]
    assert same(hashes(out), undisturbed[1])
    assert '"cause": "a worker of the Ray cluster was lost' in (out / "s2q/report.json").read_text()
    record("Ray, nodes killed in a block", {"runs": 1, "nodes killed": 2, "equal": 1})


def test_a_run_whose_cluster_is_lost_resumes_on_another_one(cluster_of, quantize_tiny, undisturbed, tmp_path):
    cluster, out = cluster_of(2), tmp_path / "out"
    process = start(quantize_tiny, cluster.flags, out)
    wait_for_block(out)
    cluster.close()
    code, output = finish(process)
    assert code == 4, output[-1500:]
    assert "does not answer any more; run the same command again" in output
    assert not out.exists()
    code, output = finish(start(quantize_tiny, cluster_of(2).flags, out))
    assert code == 0, output[-1500:]
    assert same(hashes(out), undisturbed[1])
    assert not list(tmp_path.glob(".*"))
    record("Ray, head and nodes killed", {"runs": 1, "resumed": 1, "equal": 1})
