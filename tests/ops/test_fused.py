"""The compiled elementwise passes: PyTorch's bits, and PyTorch's operations wherever they cannot be compiled."""

import itertools
import subprocess

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.input_path import InputTensors
from s2q.core.packing import pack_codes, unpack_codes
from s2q.core.qparams import quantize_per_token
from s2q.ops import bits, fused
from s2q.ops.activation_path import activation_path
from s2q.ops.passes import DTYPES, Passes, vector
from s2q.ops.rescaled_int_matmul import rescaled_int_matmul


@pytest.fixture
def uncached():
    fused.compiled.cache_clear()
    yield
    fused.compiled.cache_clear()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_this_machine_compiles_them_if_it_has_a_compiler():
    assert (fused.passes() is not None) == (fused._obstacle() is None)


@pytest.mark.parametrize("columns", [1, 7, 64, 1000])
@pytest.mark.parametrize("threads", [1, 2])
def test_scaling_rounds_once(passes, columns, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = draw(70, 2 * columns).bfloat16()[:, :columns]
        shift, scale = draw(columns, seed=1), draw(columns, seed=2)
        for parts in ((shift, scale), (None, scale), (shift, None)):
            expected = (x.float() - (0 if parts[0] is None else parts[0])) * (1 if parts[1] is None else parts[1])
            out = torch.empty(70, columns, dtype=torch.bfloat16)
            vectors = [vector(part, columns, missing=missing) for part, missing in zip(parts, (0, 1), strict=True)]
            assert torch.equal(passes.scale(x, *vectors, out=out), expected.bfloat16())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bits", [2, 4, 6, 8])
@pytest.mark.parametrize("clip", [None, torch.tensor([0.6]), torch.linspace(0.1, 1, 40).unsqueeze(1)])
def test_quantization_is_that_of_the_reference(passes, dtype, num_bits, clip):
    y = (draw(40, 333) * draw(40, 1, seed=1).exp() * 100).to(dtype)
    y[3], y[4, 5], y[5, 5], y[6] = 0, torch.nan, torch.inf, (y[6] * 4).round() / 8  # ties
    y[7] *= 1e-38
    codes, scale = torch.empty(40, 333, dtype=torch.int8), torch.empty(40, 1)
    passes.quantize(y, vector(clip, 40, missing=1, single=True), num_bits=num_bits, codes=codes, scale=scale)
    expected = quantize_per_token(y, num_bits=num_bits, clip_ratio=clip)
    torch.testing.assert_close(scale, expected[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes, expected[0])


@pytest.mark.parametrize(("value", "single"), [(draw(6), False), (draw(1), False), (draw(6), True), (draw(0), True)])
def test_a_vector_of_another_length_is_refused(value, single):
    with pytest.raises(InvalidInputError, match=f"{value.numel()}.; expected 7 numbers"):
        vector(value, 7, missing=1, single=single)
    assert vector(None, 7, missing=1, single=single).numel() == (1 if single else 7)
    assert vector(draw(7), 7, missing=1, single=single).shape == (7,)


def test_a_tensor_that_is_not_on_the_cpu_is_refused(passes):
    x, scale = draw(5, 8).bfloat16(), torch.empty(8, device="meta")
    with pytest.raises(InvalidInputError, match="pass scale_bf16: got a tensor on meta; expected the CPU"):
        passes.scale(x, scale, scale, out=torch.empty_like(x))


def test_unpacking_and_rescaling_odd_sizes(passes):
    w = torch.randint(-8, 8, (33, 42), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed, out = pack_codes(w, num_bits=4), torch.empty(33, 42, dtype=torch.int8)
    passes.unpack(packed, out=out)
    assert torch.equal(out, unpack_codes(packed, num_bits=4, in_features=42))
    sums = torch.randint(-(1 << 28), 1 << 28, (40, 33), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    w_scale, x_scale, bias = draw(33), draw(40, 1, seed=1), draw(33, seed=2) * 1e7
    wide = torch.zeros(40, 50, dtype=torch.bfloat16)
    passes.rescale(sums, w_scale, x_scale.flatten(), bias, out=wide[:, 5:38])
    assert torch.equal(wide[:, 5:38], torch.addcmul(bias, sums.float() * w_scale, x_scale).bfloat16())
    assert not bool(wide[:, :5].any() or wide[:, 38:].any())


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "is_fused"),
    [(64, 200, 1, True), (300, 64, 33, True), (4097, 200, 16, True), (70, 4099, 192, True)]
    + [(300, 200, 193, False), (63, 200, 16, False), (300, 63, 16, False)],
)
def test_a_branch_is_added_before_the_last_rounding(rows, columns, rank, is_fused, monkeypatch):
    generator, branches, rescale = torch.Generator().manual_seed(0), [], Passes.rescale

    def heard(self, *tensors, branch=None, out):
        branches.append(branch)
        rescale(self, *tensors, branch=branch, out=out)

    monkeypatch.setattr(Passes, "rescale", heard)
    w = torch.randint(-8, 8, (columns, 96), dtype=torch.int8, generator=generator)
    x = torch.randint(-32, 32, (rows, 96), dtype=torch.int8, generator=generator)
    low, weight = draw(rows, rank) * 1e3, draw(columns, rank, seed=1).bfloat16()
    scales = draw(rows, 1, seed=2).abs(), pack_codes(w, num_bits=4), draw(columns, seed=3).abs()
    for dtype, bias in itertools.product(DTYPES, (None, draw(columns, seed=4).bfloat16())):
        expected, found = (
            rescaled_int_matmul(x, *scales, bias, low, weight, x_bits=6, w_bits=4, out_dtype=dtype, backend=backend)
            for backend in ("reference", "cpu")
        )
        assert torch.equal(found, expected), (dtype, bias is None)
    passes = fused.passes()
    if passes is not None and passes.adds_branches:
        assert branches
        assert all((branch is not None) == is_fused for branch in branches)


@pytest.mark.parametrize(
    ("low", "weight"),
    [
        (torch.ones(64, 8, dtype=torch.bfloat16), torch.ones(64, 8)),
        (torch.ones(64, 8, dtype=torch.float64), torch.ones(64, 8)),
        (torch.ones(64, 4), torch.ones(64, 8)),
        (torch.ones(32, 8), torch.ones(64, 8)),
    ],
    ids=["bf16", "fp64", "rank", "rows"],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_branch_that_does_not_fit_is_an_error(low, weight, backend):
    x, w = torch.ones(64, 16, dtype=torch.int8), pack_codes(torch.ones(64, 16, dtype=torch.int8), num_bits=4)
    with pytest.raises(RuntimeError):
        rescaled_int_matmul(
            x, torch.ones(64, 1), w, torch.ones(64), None, low, weight, w_bits=4, out_dtype=torch.float32,
            backend=backend,
        )  # fmt: skip


def run(backend="cpu"):
    x, basis = draw(70, 24).bfloat16(), torch.linalg.qr(draw(24, 3))[0].bfloat16()
    path = InputTensors(shift=draw(24), scale=draw(24, seed=1), right=draw(6, 6, seed=2), low_rank_basis=basis)
    codes, scale, coefficients = activation_path(x, path, num_bits=6, backend=backend)
    w = pack_codes(codes[:10].clamp(-8, 7), num_bits=4)
    branch = {"low_rank_input": coefficients, "low_rank_weight": draw(10, 3)}
    outputs = [
        rescaled_int_matmul(codes, scale, w, draw(10), *((draw(10),) if bias else ()), **rest, w_bits=4, **kind)
        for bias in (True, False)
        for rest in (branch, {})
        for kind in ({"out_dtype": dtype, "backend": backend} for dtype in (torch.bfloat16, torch.float32))
    ]
    return [codes, scale, coefficients, *outputs]


def fails(*_arguments, **_options):
    raise subprocess.CalledProcessError(1, ["cc"])


REASONS = {
    "switched off": lambda patch: patch.setenv(fused.VARIABLE, "0"),
    "no compiler": lambda patch: patch.setattr(fused, "_compiler", lambda: None),
    "the compiler fails": lambda patch: patch.setattr(fused, "_library", fails),
    "other bits": lambda patch: patch.setattr(bits, "equals_torch", lambda passes: False),
    "no file": lambda patch: patch.setattr(fused, "SOURCES", (fused.SOURCES[0].with_name("missing.c"),)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_without_them_pytorch_computes_the_same(monkeypatch, uncached, reason, caplog):
    expected = run()
    fused.compiled.cache_clear()
    REASONS[reason](monkeypatch)
    with caplog.at_level("DEBUG", logger="s2q.ops.fused"):
        found = run()
    assert fused.passes() is None
    assert "elementwise passes run in PyTorch" in caplog.text
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_library_that_others_may_write_is_not_loaded(monkeypatch, uncached, tmp_path, passes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused.compiled.cache_clear()
    assert fused.passes() is not None
    (library,) = (tmp_path / "s2q").glob("fused-*.so")
    library.write_bytes(b"not a library")
    library.chmod(0o666)
    fused.compiled.cache_clear()
    assert fused.passes() is not None, "compiled for once, beside the one that may be anything"
    assert library.read_bytes() == b"not a library"


def test_a_home_without_room_for_a_cache(monkeypatch, uncached, tmp_path, passes):
    (tmp_path / "s2q").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused.compiled.cache_clear()
    assert fused.passes() is not None


def test_the_check_sees_a_single_wrong_bit(passes, monkeypatch):
    exact = type(passes).unpack

    def wrong(self, packed, *, out):
        exact(self, packed, out=out)
        out[-1, -1] ^= 1

    monkeypatch.setattr(type(passes), "unpack", wrong)
    assert not bits.equals_torch(passes)


def test_a_cap_on_instructions_is_kept(monkeypatch):
    monkeypatch.setattr(fused, "is_x86", lambda: True)
    monkeypatch.setattr(fused, "features", lambda: frozenset({"avx2"}))
    assert "-mno-avx512f" in fused._flags()


def test_the_check_saves_nothing_for_the_backward_pass_of_its_caller(passes):
    def refuse(tensor):
        raise AssertionError("a tensor of the check was saved by the caller")

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        assert bits.equals_torch(passes)


def test_the_check_runs_in_inference_mode(passes):
    with torch.inference_mode():
        assert bits.equals_torch(passes)
