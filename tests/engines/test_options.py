from types import SimpleNamespace

import pytest

from s2q.common.errors import InvalidInputError, ResourceError, UsageError
from s2q.engines import options
from s2q.engines.engine import InProcessEngine
from s2q.engines.options import Workers, workers_argument
from s2q.run.quantize import _worker_count

CPU_COUNT = options.cpu_count  # the suite replaces it


def parsed(*, workers="auto", devices=None, device="cpu", engine="processes", ray_address=None):
    return workers_argument(workers=workers, devices=devices, device=device, engine=engine, ray_address=ray_address)


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(options, "gpu_count", lambda: 3)
    monkeypatch.setattr(options.arguments, "device_name", str)


def test_auto_takes_all_cores_of_a_cpu_and_all_gpus(monkeypatch, gpus):
    monkeypatch.setattr(options, "cpu_count", lambda: 4)
    assert parsed().planned(9) == 4
    assert parsed().planned(3) == 3
    assert parsed().planned(9, most=2) == 2
    assert parsed(device="cuda").devices == ("cuda:0", "cuda:1", "cuda:2")
    assert parsed(device="cuda").planned(9) == 3
    assert parsed(device="cuda:1").planned(9) == 1


def test_each_gpu_has_a_worker_where_the_memory_of_a_gpu_has_room_for_only_one():
    layers = [SimpleNamespace(name=f"transformer.blocks.{index}.to_q") for index in range(30)]
    blocks = SimpleNamespace(name="blocks", peak_memory_bytes=20)
    planned = SimpleNamespace(layers=layers, stages=[blocks], device={"memory_bytes": 24})
    gpus = Workers(devices=("cuda:0", "cuda:1"))
    assert _worker_count(planned, SimpleNamespace(calibrates=True), gpus) == 2
    assert _worker_count(planned, SimpleNamespace(calibrates=True), Workers()) == 1
    assert _worker_count(planned, SimpleNamespace(calibrates=False), gpus) == 1


def test_a_number_of_workers_is_kept_up_to_the_number_of_tasks(caplog):
    assert parsed(workers=3).planned(9, most=1) == 3
    assert parsed(workers=3).planned(2) == 2
    assert "got 3 workers for 2 tasks; 2 are used" in caplog.text


def test_workers_take_devices_in_turn(gpus):
    where = parsed(workers=3, devices=["cuda:0", "cuda:2"])
    assert where._devices_of(3) == ["cuda:0", "cuda:2", "cuda:0"]
    assert where.on_one_device(3) == 2
    assert parsed(workers=3, device="cuda").on_one_device(3) == 1
    assert parsed(workers=3).on_one_device(3) == 3
    assert parsed(workers=3, device="cuda:1").on_one_device(3) == 3


def test_only_workers_that_outnumber_gpus_share_one(gpus):
    assert parsed(workers=4, device="cuda").on_one_gpu == 2
    assert parsed(workers=3, device="cuda:1").on_one_gpu == 3
    assert parsed(device="cuda").on_one_gpu == parsed(workers=3, device="cuda").on_one_gpu == 1
    assert parsed(workers=3).on_one_gpu == 1
    assert Workers(devices=("cuda:1",), count=3, engine="ray").on_one_gpu == 1


def test_one_worker_is_this_process():
    assert isinstance(Workers(count=1).open(1), InProcessEngine)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"workers": 0}, InvalidInputError, "workers: got 0; expected at least 1"),
        ({"engine": "dask"}, InvalidInputError, "unknown engine 'dask': .*all: processes, ray"),
        ({"devices": []}, InvalidInputError, "devices: got none; name at least one"),
        ({"devices": ["cpu", "cuda:0"]}, (InvalidInputError, ResourceError), "cpu, cuda:0|cuda:0"),
        ({"devices": ["cuda:7"]}, ResourceError, "cuda:7"),
        ({"devices": ["cpu"], "engine": "ray"}, UsageError, "Ray assigns GPUs itself"),
        ({"engine": "ray", "ray_address": "ray://host:10001"}, InvalidInputError, "expected HOST:PORT or auto"),
        ({"ray_address": "host:1"}, UsageError, "add --engine ray, or remove it"),
        ({"engine": "ray", "ray_address": "127.0.0.1:9"}, ResourceError, "127.0.0.1:9: nothing answers"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        parsed(**arguments)
    assert "\n" not in str(caught.value)


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("s2q.engines.ray_cluster.is_installed", lambda package: False)
    with pytest.raises(UsageError, match=r"Ray is not installed; pip install 's2q\[ray\]', or use --engine processes"):
        parsed(engine="ray")


def test_devices_of_one_kind_only(gpus):
    with pytest.raises(InvalidInputError, match="devices: got cpu, cuda:0; results differ between kinds"):
        parsed(devices=["cpu", "cuda:0"])


def test_a_loaded_pipeline_is_refused_with_several_workers():
    with pytest.raises(UsageError, match="quantize: got workers=2 and a loaded pipeline"):
        parsed(workers=2).check_alone("quantize")
    with pytest.raises(UsageError, match="eval: got engine='ray' and a loaded pipeline"):
        Workers(engine="ray").check_alone("eval")
    parsed().check_alone("quantize")


def test_a_loaded_pipeline_is_refused_with_several_named_devices(gpus):
    with pytest.raises(UsageError, match="generate: got devices=cuda:0,cuda:2 and a loaded pipeline"):
        parsed(devices=["cuda:0", "cuda:2"]).check_alone("generate")
    parsed(devices=["cuda:2"]).check_alone("generate")
    parsed(device="cuda").check_alone("generate")


@pytest.mark.parametrize(
    ("quotas", "cores"),
    [({}, 3), ({"": "max 100000"}, 3), ({"a/b": "150000 100000"}, 1), ({"": "200000 100000", "a/b": "max 100000"}, 2)],
)
def test_a_cpu_quota_of_any_control_group_limits_the_cores(monkeypatch, tmp_path, quotas, cores):
    (tmp_path / "groups/a/b").mkdir(parents=True)
    for group, quota in quotas.items():
        (tmp_path / "groups" / group / "cpu.max").write_text(f"{quota}\n")
    (tmp_path / "membership").write_text("0::/a/b\n")
    read = options._cpu_quota
    monkeypatch.setattr(options, "_cpu_quota", lambda *_: read(tmp_path / "groups", tmp_path / "membership"))
    monkeypatch.setattr(options.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert CPU_COUNT() == cores
    (tmp_path / "membership").write_text("1:cpu:/\n")
    assert CPU_COUNT() == 3
