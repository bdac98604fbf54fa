"""Codes of packed linears: computing with them is refused in one line; moving, copying and storing them works."""

import copy
import io
import pickle
import warnings

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from s2q.common.errors import UsageError
from s2q.core.schemes import LinearScheme, PerChannel, PerToken, QuantScheme
from s2q.nn import PackedLinear
from s2q.nn.codes import PackedCodes
from s2q.rounding import round_rtn

W8A8, W4A6, W4A16 = ((8, 8), (4, 6), (4, None))
REFUSED = r"^blocks\.0\.to_q \(w\da\d+\): packed codes cannot be .*; call dequantize\(\) on the transformer first.*$"


@pytest.fixture(params=[W8A8, W4A6, W4A16], ids=["w8a8", "w4a6", "w4a16"])
def layer(request):
    w_bits, a_bits = request.param
    activation = None if a_bits is None else QuantScheme(num_bits=a_bits, granularity=PerToken(), dynamic=True)
    weight = QuantScheme(num_bits=w_bits, granularity=PerChannel())
    rounded = round_rtn(torch.randn(24, 24, generator=torch.Generator().manual_seed(0)), weight)
    scheme = LinearScheme(weight=weight, activation=activation)
    made = PackedLinear.from_rounded(rounded, bias=torch.zeros(24), scheme=scheme)
    made.name = "blocks.0.to_q"
    return made


def x(rows=3):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(1))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def edit_row(codes):
    codes[0] = 0


def merge_by_hand(layer):
    layer.weight.data += torch.ones(24, 24)


def average_into(layer):
    for parameter in layer.parameters():
        parameter.data.mul_(0.5)


def overwrite_all(layer):
    for parameter in layer.parameters():
        parameter.data.copy_(torch.zeros(parameter.shape))


def from_vector(layer):
    nn.utils.vector_to_parameters(
        torch.zeros(sum(parameter.numel() for parameter in layer.parameters())), layer.parameters()
    )


def edit_state(layer):
    layer.state_dict()["weight"].zero_()


READERS = {
    "F.linear": lambda layer: F.linear(x(), layer.weight),
    "matmul": lambda layer: x() @ layer.weight.t(),
    "cat": lambda layer: torch.cat([layer.weight, layer.weight]),
    "cat of data": lambda layer: torch.cat([layer.weight.data, layer.weight.data]),
    "cast": lambda layer: layer.weight.to(torch.float32),
    "float": lambda layer: layer.weight.float(),
    "dtype of type": lambda layer: layer.weight.type(torch.float16),
    "norm": lambda layer: layer.weight.norm(),
    "svd": lambda layer: torch.linalg.svd(layer.weight),
    "view": lambda layer: layer.weight.view(-1),
    "transpose": lambda layer: layer.weight.T,
    "index": lambda layer: layer.weight[0],
    "item assignment": lambda layer: edit_row(layer.weight),
    "item assignment to data": lambda layer: edit_row(layer.weight.data),
    "item assignment to detached": lambda layer: edit_row(layer.weight.detach()),
    "in-place": lambda layer: layer.weight.data.add_(1),
    "in-place integers": lambda layer: layer.weight.data.bitwise_xor_(255),
    "zero": lambda layer: nn.init.zeros_(layer.weight),
    "init": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "fill": lambda layer: layer.weight.data.fill_(3),
    "swap of data": lambda layer: setattr(layer.weight, "data", torch.zeros(24, 24)),
    "another shape": lambda layer: setattr(layer.weight, "data", torch.zeros(2, 2, dtype=torch.uint8)),
    "another weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(24, 24))),
    "copy of floats": lambda layer: layer.weight.data.copy_(torch.zeros(layer.weight.shape)),
    "copy into floats": lambda layer: torch.zeros(layer.weight.shape).copy_(layer.weight),
    "gradient": lambda layer: layer.weight.requires_grad_(True),
    "out=": lambda layer: torch.ones(3, out=layer.weight),
    "merge by hand": merge_by_hand,
    "moving average": average_into,
    "overwriting all": overwrite_all,
    "vector_to_parameters": from_vector,
    "state_dict edited": edit_state,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "random prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "structured prune": lambda layer: prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
    "mask": lambda layer: prune.custom_from_mask(layer, "weight", torch.zeros(24, 24)),
    "weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "parametrized weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "parametrized spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_computing_with_codes_is_refused_in_one_line_and_changes_nothing(layer, read):
    before, output = {name: value.clone() for name, value in layer.state_dict().items()}, layer(x())
    codes, names = layer.codes().clone(), set(layer.__dict__) | set(layer._parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UsageError, match=REFUSED) as refused:
            read(layer)
    assert "\n" not in str(refused.value)
    assert torch.equal(layer.codes(), codes)
    assert type(layer) is PackedLinear
    assert set(layer.__dict__) | set(layer._parameters) == names
    if read not in (average_into, overwrite_all, from_vector):  # which go on to scales and biases only if not refused
        assert torch.equal(layer(x()), output)
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def emptied(layer):
    return PackedLinear(24, 24, bias=True, scheme=layer.scheme, device="cpu")


def through_a_state_file(layer):
    file, other = io.BytesIO(), emptied(layer)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def through_an_assigned_state(layer):
    other = emptied(layer).to("meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    return other


def through_safetensors(layer):
    other = emptied(layer)
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(layer.state_dict())))
    return other


def through_plain_tensors(layer):
    other = emptied(layer)
    for own, given in zip(other.parameters(), layer.parameters(), strict=True):
        own.data.copy_(given.data)
    return other


def moved_by_data(layer):
    for parameter in layer.parameters():
        parameter.data = parameter.data.clone()
    return layer


def through_accelerate(layer):
    modeling = pytest.importorskip("accelerate.utils.modeling")
    stored = {name: value.clone() for name, value in layer.state_dict().items()}
    for name in stored:
        modeling.set_module_tensor_to_device(layer, name, "meta")
    for name, value in stored.items():
        modeling.set_module_tensor_to_device(layer, name, "cpu", value=value)
    return layer


def swapped(layer):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return through_a_state_file(layer).to("cpu", torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_torch_save,
    "state file": through_a_state_file,
    "assigned state": through_an_assigned_state,
    "safetensors": through_safetensors,
    "copied parameters": through_plain_tensors,
    "data moved": moved_by_data,
    "cast": lambda layer: layer.to("cpu", torch.float32),
    "shared memory": lambda layer: layer.share_memory(),
    "to_empty": lambda layer: through_an_assigned_state(layer).to_empty(device="cpu") and copy.deepcopy(layer),
    "accelerate": through_accelerate,
    "swapped tensors": swapped,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_codes_travel_and_are_still_guarded(layer, way):
    wanted = layer(x())
    other = way(layer)
    assert torch.equal(other(x()), wanted)
    assert isinstance(other._parameters["weight"], PackedCodes)
    with pytest.raises(UsageError, match="packed codes cannot be"):
        F.linear(x(), other.weight)
    assert torch.equal(other.weight, layer.weight)


def test_what_libraries_ask_of_a_weight_is_answered(layer):
    weight = layer.weight
    assert (weight.dtype, weight.device.type, weight.requires_grad) == (torch.uint8, "cpu", False)
    assert weight.shape == weight.data.shape == weight.size() == (24, weight.numel() // 24)
    assert weight.data_ptr() == weight.detach().data_ptr() == weight.data.data_ptr() == layer.codes().data_ptr() or (
        layer.scheme.weight.num_bits <= 4
    )
    assert not weight.is_floating_point()
    assert weight.to("meta").is_meta
    assert isinstance(weight, nn.Parameter)
    assert dict(layer.named_parameters())["weight"] is weight
    assert repr(weight).startswith("PackedCodes([24")
    assert torch.empty_like(weight).dtype == torch.uint8
    array = weight.cpu().numpy()
    array[:] = 0
    assert layer.codes().any()


def test_a_copy_does_not_share_its_codes(layer):
    other, codes = copy.deepcopy(layer), layer.codes().clone()
    other.weight.data.copy_(torch.zeros(other.weight.shape, dtype=torch.uint8))
    assert torch.equal(layer.codes(), codes)
    assert not torch.equal(other.codes(), codes)
