"""Ops give the same bits whatever state of torch their caller has set, on every backend."""

import copy
import functools

import pytest
import torch

from quick import quick
from s2q.common.torch_state import fresh_torch_state
from s2q.core.cubes import cube_means
from s2q.core.input_path import InputTensors
from s2q.core.qparams import quantize_per_token, weight_scale
from s2q.core.schemes import Delta, LinearScheme, PerChannel, PerGroup, QuantScheme
from s2q.core.tokens import TokenGrid, token_grid
from s2q.nn import Estimator, PackedLinear, set_backend
from s2q.ops import activation_path as paths
from s2q.ops import attention_colsum as sums
from s2q.ops import rescaled_int_matmul as products
from s2q.ops import weight_only_matmul as weights
from s2q.ops.fake_quantize import fake_quantize_input
from s2q.ops.int_matmul import int_matmul
from s2q.ops.kronecker import scaled_kronecker
from s2q.rounding import round_rtn
from schemes import activations
from states import STATES


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(rows, columns, bits, seed=0):
    limit = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit, (rows, columns), dtype=torch.int8, generator=generator)


X, ORTHOGONAL = 30 * draw(9, 48), torch.linalg.qr(draw(6, 6))[0]
PARTS = {"shift": draw(48, seed=1), "scale": draw(48, seed=2).exp(), "left": ORTHOGONAL, "right": draw(8, 8, seed=3)}
BRANCH = {"low_rank_basis": torch.linalg.qr(draw(48, 2, seed=4))[0].bfloat16()}
XQ, WQ, SX, SW = codes(9, 48, 6), codes(20, 48, 4, 1), draw(9, 1).abs(), draw(20).abs()
REST = {"bias": draw(20), "low_rank_input": draw(9, 2), "low_rank_weight": draw(20, 2).bfloat16()}
Q, K, MASK = draw(1, 2, 10, 16), draw(1, 2, 12, 16, seed=1), draw(1, 1, 10, 12)
CLIP = torch.tensor([0.9])
BITS = {"x_bits": 6, "w_bits": 4}
OPS = {
    "activation_path": (
        paths,
        lambda b: paths.activation_path(X, InputTensors(**PARTS, clip_ratio=CLIP), num_bits=6, backend=b),
    ),
    "activation_path, branch": (
        paths,
        lambda b: paths.activation_path(X, InputTensors(**PARTS, **BRANCH, clip_ratio=CLIP), num_bits=6, backend=b),
    ),
    "activation_path, bf16": (
        paths,
        lambda b: paths.activation_path(
            X.bfloat16(), InputTensors(**PARTS, **BRANCH, deflates=False), num_bits=4, backend=b
        ),
    ),
    "attention_colsum": (sums, lambda b: sums.attention_colsum(Q, K, mask=MASK, backend=b)),
    "attention_colsum, bf16": (sums, lambda b: sums.attention_colsum(Q.bfloat16(), K.bfloat16(), backend=b)),
    "rescaled_int_matmul": (
        products,
        lambda b: products.rescaled_int_matmul(XQ, SX, WQ, SW, **REST, **BITS, out_dtype=torch.float32, backend=b),
    ),
    "rescaled_int_matmul, bf16": (
        products,
        lambda b: products.rescaled_int_matmul(XQ, SX, WQ, SW, **BITS, out_dtype=torch.bfloat16, backend=b),
    ),
    "rescaled_int_matmul, branch": (
        products,
        lambda b: products.rescaled_int_matmul(
            XQ.repeat(8, 1),
            SX.repeat(8, 1),
            WQ.repeat(4, 1),
            SW.repeat(4),
            low_rank_input=REST["low_rank_input"].bfloat16().float().repeat(8, 1),
            low_rank_weight=REST["low_rank_weight"].repeat(4, 1),
            **BITS,
            out_dtype=torch.bfloat16,
            backend=b,
        ),
    ),
    "weight_only_matmul": (
        weights,
        lambda b: weights.weight_only_matmul(X, WQ, SW, bias=REST["bias"], w_bits=4, backend=b),
    ),
    "weight_only_matmul, bf16": (
        weights,
        lambda b: weights.weight_only_matmul(X.bfloat16(), WQ, SW, w_bits=4, backend=b),
    ),
    "weight_only_matmul, many rows": (
        weights,
        lambda b: weights.weight_only_matmul(torch.cat([X] * 3), WQ, SW, w_bits=4, backend=b),
    ),
}
QUICK_STATES = quick(STATES, "default float16", "default device", "everything")
CASES = [(name, backend) for name, (op, _) in OPS.items() for backend in ("auto", *op.BACKENDS)]


def equal(found, wanted):
    if not isinstance(wanted, tuple):
        found, wanted = (found,), (wanted,)
    return all(
        (one is None and other is None)
        or (one.device, one.dtype) == (other.device, other.dtype)
        and torch.equal(one, other)
        for one, other in zip(found, wanted, strict=True)
    )


@functools.cache
def plain_result(name, backend):
    """What an op gives in the state that torch starts with."""
    return OPS[name][1](backend)


@pytest.mark.parametrize("state", QUICK_STATES)
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_an_op_gives_the_same_bits(name, backend, state):
    if backend == "triton":
        pytest.importorskip("triton")
    op, wanted = OPS[name][1], plain_result(name, backend)
    with STATES[state]():
        found = op(backend)
    with STATES[state]():  # a second time: what the first one kept is of no other kind
        again = op(backend)
    assert equal(found, wanted)
    assert equal(again, wanted)
    assert equal(op(backend), wanted)


@pytest.mark.parametrize("state", STATES)
def test_ops_without_backends_give_the_same_bits(state):
    def results():
        return (
            scaled_kronecker(X, **{name: PARTS[name] for name in ("scale", "left", "right")}),
            int_matmul(XQ, WQ, **BITS),
            *quantize_per_token(X, num_bits=6, clip_ratio=0.9),
            *paths.transform_input(X, InputTensors(**PARTS, **BRANCH)),
        )

    wanted = results()
    with STATES[state]():
        found = results()
    assert equal(found, wanted)


GRID = TokenGrid(frames=3, height=2, width=2)
TOKENS = activations(6)
ACTIVATIONS = {
    "integers": TOKENS,
    "weight-only": None,
    "deltas": activations(6, delta=Delta(cube=(2, 1, 1))),
    "groups": activations(6, group_size=24),
    "levels": activations(4, levels="lloyd_max"),
}


def packed(kind, granularity):
    weight = QuantScheme(num_bits=4, granularity=granularity)
    estimator = Estimator(48, 20, frames=3, seed=0)
    inputs = {
        "input_shift": PARTS["shift"],
        "transform_scale": PARTS["scale"],
        "transform_left": PARTS["left"],
        "transform_right": PARTS["right"],
        **BRANCH,
        "low_rank_weight": REST["low_rank_weight"],
        "estimator_input": estimator.alpha.detach(),
        "estimator_output": draw(20, seed=7),
        "estimator_frames": draw(3, seed=8),
    }
    if ACTIVATIONS[kind] is not None:
        inputs["activation_clip"] = torch.tensor([0.9])
    return PackedLinear.from_rounded(
        round_rtn(draw(20, 48, seed=5), weight),
        bias=REST["bias"],
        scheme=LinearScheme(weight=weight, activation=ACTIVATIONS[kind]),
        inputs=inputs,
    )


@pytest.mark.parametrize("state", QUICK_STATES)
@pytest.mark.parametrize("backend", ["reference", "cpu", "auto", "fastest"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_packed_linear_gives_the_same_bits_in_the_dtype_of_its_input(kind, backend, state):
    layer = packed(kind, PerGroup(group_size=24) if kind == "groups" else PerChannel())
    set_backend(layer, backend)
    other = copy.deepcopy(layer)
    for dtype in (torch.float32, torch.bfloat16):
        x = (draw(1, 12, 48) * 3).to(dtype)
        with token_grid(GRID):
            wanted = layer(x)
            with STATES[state]():
                found = other(x)
            assert equal(found, wanted)
            assert found.dtype == dtype
            assert equal(other(x), wanted)


@pytest.mark.parametrize("state", [name for name in STATES if "inference" not in name and name != "everything"])
@pytest.mark.parametrize("kind", ["integers", "deltas"])
def test_gradients_through_a_packed_linear_are_the_same(kind, state):
    layer, x = packed(kind, PerChannel()), draw(1, 12, 48)

    def gradient():
        own = x.clone().requires_grad_()
        with torch.enable_grad(), token_grid(GRID):
            layer(own).square().sum().backward()
        return own.grad

    wanted = gradient()
    with STATES[state]():
        found = gradient()
    assert equal(found, wanted)


@pytest.mark.parametrize("state", STATES)
def test_fresh_state_is_that_of_a_new_process_and_is_given_back(state):
    plain = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    with STATES[state]():
        before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
        with fresh_torch_state(), fresh_torch_state():
            assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == plain
            assert torch.ones(1).dtype == torch.float32
            assert torch.ones(1).device.type == "cpu"
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert cube_means(draw(1, 2, 2, 2, 4), (2, 1, 1)).dtype == torch.float32
            assert weight_scale(draw(4, 8), QuantScheme(num_bits=4, granularity=PerChannel())).device.type == "cpu"
            assert fake_quantize_input(draw(2, 48), TOKENS).dtype == torch.float32
        assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == before
    assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == plain
