"""The files of examples/: their commands are understood by the command line, with options of a Ray cluster."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from s2q.cli.app import app
from s2q.engines import ray_cluster
from s2q.engines.options import workers_argument
from s2q.recipes.load import recipe_names

EXAMPLES = Path(__file__).parent.parent / "examples"
STUBS = {
    "scontrol": '[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf "node1\\n" && sleep 0.2 && printf "node2\\n"',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; "$@"',
    "ray": 'echo "ray: $*" >&2; while [ "$1" != -- ]; do shift; done; shift; "$@"',
    "s2q": 'printf "%s\\0" "$@"',
}


def parsed(words):
    name, *rest = words
    return typer.main.get_command(app).commands[name].make_context(name, rest).params


@pytest.fixture
def no_devices(monkeypatch):
    """The device and the cluster of the example need not be here."""
    monkeypatch.setattr("s2q.common.arguments.check_device", lambda name: None)
    monkeypatch.setattr(ray_cluster, "connect", lambda address: None)


def run_slurm(tmp_path, *arguments):
    for name, code in STUBS.items():
        stub = tmp_path / name
        stub.write_text(f"#!/bin/bash\n{code}\n")
        stub.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "123456",
    }
    command = ["bash", str(EXAMPLES / "slurm.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def check(params, *, address, workers):
    assert params["recipe"] in recipe_names()
    assert params["device"] == "cuda"
    where = workers_argument(
        workers=params["workers"],
        devices=params["devices"] or None,
        device=params["device"],
        engine=params["engine"],
        ray_address=params["ray_address"],
    )
    assert (where.engine, where.ray_address, where.count) == ("ray", address, workers)


def test_the_slurm_script_quantizes_on_the_cluster_that_it_starts(tmp_path, no_devices):
    ended = run_slurm(tmp_path, "/shared/my model", "s2q-w4a6", "/shared/out", "/shared/prompts.txt")
    assert ended.returncode == 0, ended.stderr
    params = parsed(ended.stdout.rstrip("\0").split("\0"))
    assert params["model"] == "/shared/my model"
    assert (str(params["out"]), str(params["prompts"])) == ("/shared/out", "/shared/prompts.txt")
    check(params, address="node1:23456", workers=None)
    assert ended.stderr.startswith("ray: symmetric-run --address node1:23456 --min-nodes 2 -- s2q quantize")


def test_the_slurm_script_ends_when_an_argument_is_missing(tmp_path):
    ended = run_slurm(tmp_path, "model", "s2q-w4a6", "out")
    assert ended.returncode != 0
    assert "$4" in ended.stderr
    assert ended.stdout == ""


def test_ray_has_the_command_of_the_slurm_script():
    scripts = pytest.importorskip("ray.scripts.symmetric_run")
    options = {option for parameter in scripts.symmetric_run.params for option in parameter.opts}
    assert {"--address", "--min-nodes"} <= options


def test_the_job_of_kuberay_quantizes_with_a_worker_for_each_gpu_of_its_cluster(no_devices):
    job = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    gpus = 0
    for spec, replicas in ((head, 1), (group, group["replicas"])):
        pod = spec["template"]["spec"]
        (container,) = pod["containers"]
        gpus += replicas * int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert "/models" in {mount["mountPath"] for mount in container["volumeMounts"]}
    program, *words = shlex.split(job["spec"]["entrypoint"])
    assert program == "s2q"
    params = parsed(words)
    check(params, address="auto", workers=gpus)
    assert all(str(params[name]).startswith("/models/") for name in ("model", "out", "prompts"))
