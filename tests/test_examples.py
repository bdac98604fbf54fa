"""The files of examples/: scripts run on tiny models; commands have options that the command line understands."""

import importlib.util
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from published import published_models
from safetensors import safe_open

import s2q
from s2q.cli.app import app
from s2q.engines import ray_cluster
from s2q.engines.options import workers_argument
from s2q.recipes.load import recipe_names
from tiny import tiny_pipeline

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


FEW = {"num_prompts": 1, "seeds": [0], "num_inference_steps": 2, "metrics": ["velocity"], "workers": 1}


def example(name):
    """A script of examples/ as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_is_run_here_and_listed():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {"own_prompts", "offload_and_lora", "own_recipe", "other_tool", "comfyui"}
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    assert all(f"examples/{name}.py" in page for name in scripts)


def test_own_prompts_calibrate(embedded_tiny, tmp_path, capsys):
    script = example("own_prompts")
    scores = script.main(embedded_tiny, tmp_path / "out", recipe="s2q-w4a6", samples=2, steps=2)
    assert scores["n_prompts"] == len(script.EVALUATION)
    selection = json.loads((tmp_path / "out" / "s2q" / "selection.json").read_text())
    assert set(selection["prompts"]) <= set(script.CALIBRATION)
    assert "velocity_relative_error: " in capsys.readouterr().out


def test_offloading_and_a_lora(checkpoint_and_lora, tiny_model, tmp_path):
    checkpoint, lora = checkpoint_and_lora
    script, size = example("offload_and_lora"), {"num_inference_steps": 2, "max_sequence_length": 96}
    adapted = script.main(checkpoint, lora, str(tmp_path / "video.mp4"), **size)
    plain = script.main(out=str(tmp_path / "plain.mp4"), model=tiny_model, **size)
    assert (tmp_path / "plain" / "model_index.json").is_file()
    assert len(adapted) == len(plain) == 9
    assert any(a.tobytes() != b.tobytes() for a, b in zip(adapted, plain, strict=True))
    assert (tmp_path / "video.mp4").stat().st_size > 0


@pytest.fixture
def checkpoint_and_lora(tiny_model, tmp_path):
    pytest.importorskip("peft")
    from loras import save_lora

    s2q.quantize(tiny_model, recipe="rtn-w4a8", out=tmp_path / "checkpoint")
    lora = save_lora(s2q.load(tiny_model), tmp_path / "lora")
    return tmp_path / "checkpoint", lora


@pytest.mark.slow
def test_an_own_recipe_is_compared_with_the_one_that_it_extends(embedded_tiny, tmp_path, no_encoding):
    script = example("own_recipe")
    compared = script.main(embedded_tiny, tmp_path / "out", overrides=["distillation.epochs=1"], samples=2, **FEW)
    assert [entry["error"] for entry in compared["entries"]] == [None, None]
    assert (tmp_path / "out" / "index.html").is_file()
    recipe = s2q.plan(embedded_tiny, recipe=script.RECIPE)
    assert {layer.scheme for layer in recipe.layers if layer.name.startswith("transformer_blocks.0.")} == {"fp32"}


@pytest.mark.slow
def test_a_checkpoint_of_another_tool_is_compared(embedded_tiny, tmp_path, no_encoding):
    compared = example("other_tool").main(embedded_tiny, None, tmp_path / "out", recipe="convrot-w4a8", **FEW)
    errors = [entry["metrics"]["velocity_relative_error"]["mean"] for entry in compared["entries"]]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)  # the same codes, once converted there and back


def test_a_file_for_comfyui(tmp_path):
    tiny_pipeline("wan").save_pretrained(tmp_path / "wan")
    report = example("comfyui").main(tmp_path / "wan", tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert "blocks.0.self_attn.q.comfy_quant" in file.keys()  # noqa: SIM118
    assert report.linears["asym_w4a8_int8"] > 0


def workflow():
    return json.loads((EXAMPLES / "comfyui" / "wan-text-to-video.json").read_text())


def test_the_nodes_of_the_comfyui_workflow_are_linked_to_nodes_above_them():
    nodes = workflow()
    links = [
        (name, value[0]) for name, node in nodes.items() for value in node["inputs"].values() if isinstance(value, list)
    ]
    assert links
    assert all(int(source) < int(name) for name, source in links)
    used = {source for _, source in links}
    assert [node["class_type"] for name, node in nodes.items() if name not in used] == ["SaveVideo"]


def test_the_page_on_comfyui_names_every_node_and_file_of_the_workflow():
    page = (EXAMPLES.parent / "docs" / "comfyui.md").read_text()
    for node in workflow().values():
        assert f"| `{node['class_type']}` |" in page
        files = [value for value in node["inputs"].values() if str(value).endswith(".safetensors")]
        assert all(f"| `{file}` |" in page for file in files)
    assert f"-o ComfyUI/models/diffusion_models/{workflow()['1']['inputs']['unet_name']}\n" in page


def test_the_comfyui_workflow_has_the_published_settings_of_wan():
    call = published_models()["wan-2.1-1.3b"]["call"]
    size, sampler, rate = (workflow()[name]["inputs"] for name in ("7", "8", "10"))
    assert {"num_frames": size["length"], "height": size["height"], "width": size["width"]}.items() <= call.items()
    assert (sampler["steps"], sampler["cfg"]) == (call["num_inference_steps"], call["guidance_scale"])
    assert rate["fps"] == published_models()["wan-2.1-1.3b"]["fps"]
