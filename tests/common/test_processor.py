import subprocess
import sys

import pytest
import torch

from s2q.common import processor

AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
HASWELL = {"avx2"}
ALDER_LAKE = {"avx2", "avx_vnni"}
SKYLAKE = HASWELL | AVX512
CASCADE_LAKE = SKYLAKE | {"avx512_vnni"}
ZEN_4 = CASCADE_LAKE | {"avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN_4 | {"avx_vnni", "avx512_fp16", "amx_int8", "amx_bf16"}
TORCH_NAMES = {"avx2", "avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni", "avx512_bf16"}

X86 = [
    (set(), {}, "SSE", False, False, False),
    (HASWELL, {}, "AVX2", False, False, False),
    (ALDER_LAKE, {}, "AVX2 VNNI", False, False, False),
    ({"avx2", "avx512f"}, {}, "AVX2", False, False, False),
    (SKYLAKE, {}, "AVX-512", False, False, False),
    (CASCADE_LAKE, {}, "AVX-512 VNNI", True, False, False),
    (ZEN_4, {}, "AVX-512 VNNI + bf16", True, True, False),
    (TORCH_NAMES, {}, "AVX-512 VNNI + bf16", True, True, False),
    (SAPPHIRE_RAPIDS, {}, "AVX-512 VNNI + AMX + bf16 + fp16", True, True, True),
    (ZEN_4, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "AVX2", False, False, False),
    (ZEN_4, {"ONEDNN_MAX_CPU_ISA": "avx2"}, "AVX2", False, False, False),
    (ZEN_4, {"DNNL_MAX_CPU_ISA": "AVX2"}, "AVX2", False, False, False),
    (ZEN_4, {"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, "AVX-512 VNNI + bf16", True, True, False),
    (ZEN_4, {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, "AVX2", False, False, False),
    (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, "AVX2 VNNI", False, False, False),
    (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "AVX-512", False, False, False),
    (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "AVX-512 VNNI", True, False, False),
    (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "AVX-512 VNNI + bf16", True, True, False),
    (ZEN_4, {"ONEDNN_MAX_CPU_ISA": "a later one"}, "AVX-512 VNNI + bf16", True, True, False),
    (HASWELL, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "AVX2", False, False, False),
    (ALDER_LAKE, {"ONEDNN_MAX_CPU_ISA": "SSE41"}, "SSE", False, False, False),
]


@pytest.fixture
def cpu(monkeypatch):
    """Makes the CPU another one."""

    def pretend(flags, *, machine="x86_64", caps=None):
        for name in processor.CAPS:
            monkeypatch.delenv(name, raising=False)
        for name, value in (caps or {}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(processor.platform, "machine", lambda: machine)
        monkeypatch.setattr(processor, "_flags", lambda: frozenset({"sse2", "fma3", *flags}))
        processor.features.cache_clear()

    yield pretend
    processor.features.cache_clear()


@pytest.mark.parametrize(("flags", "caps", "name", "int8", "bf16", "fp16"), X86)
def test_what_an_x86_cpu_computes_with_is_what_onednn_may_use(cpu, flags, caps, name, int8, bf16, fp16):
    cpu(flags, caps=caps)
    assert processor.instruction_set() == name
    assert processor.has_int8_dot() == int8
    assert processor.has_arithmetic(torch.bfloat16) == bf16
    assert processor.has_arithmetic(torch.float16) == fp16
    assert processor.has_arithmetic(torch.float32)


def test_only_a_cap_that_takes_something_away_is_named(cpu):
    cpu(ZEN_4, caps={"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert processor.limited_by() == "ONEDNN_MAX_CPU_ISA=AVX2"
    for flags, caps in ((HASWELL, {"ONEDNN_MAX_CPU_ISA": "AVX2"}), (ZEN_4, {"ONEDNN_MAX_CPU_ISA": "ALL"}), (ZEN_4, {})):
        cpu(flags, caps=caps)
        assert processor.limited_by() is None


def test_caps_of_x86_mean_nothing_on_arm(cpu):
    cpu({"neon", "bf16", "i8mm"}, machine="aarch64", caps={"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert processor.instruction_set() == "aarch64 + bf16 + i8mm"
    assert processor.has_arithmetic(torch.bfloat16)
    assert not processor.has_int8_dot()
    assert processor.limited_by() is None
    cpu({"neon"}, machine="arm64")
    assert processor.instruction_set() == "arm64"
    assert not processor.has_arithmetic(torch.bfloat16)


def test_without_pytorch_s_word_the_system_tells_the_same(monkeypatch):
    wanted = processor._flags() & {*processor._X86, *processor._ARM}
    if not processor.Path("/proc/cpuinfo").is_file():
        pytest.skip("only Linux has /proc/cpuinfo")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    processor._flags.cache_clear()
    try:
        assert processor._flags() & {*processor._X86, *processor._ARM} == wanted
    finally:
        processor._flags.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(not processor.is_x86(), reason="only x86 CPUs can be capped")
def test_a_capped_process_knows_it():
    code = "from s2q.common import processor as p; print(p.instruction_set(), p.has_int8_dot())"
    environment = {**processor.os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["AVX2", "False"]
