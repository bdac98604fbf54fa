"""What is read back from an export is compared with what was written, and both with the checkpoint."""

import pytest
import torch
from torch import nn

from exported import ROW, linear_of
from s2q.common.errors import S2QError
from s2q.exports.target import encoded
from s2q.exports.targets import TARGETS
from s2q.exports.verify import check_read, verify_written

TARGET = TARGETS["sdnq"]


@pytest.fixture
def stored():
    """A model of one quantized linear and one other tensor, its form, and the tensors of its export."""
    layer, form = linear_of([ROW, ROW[::-1]], [0.5, 0.25], bias=torch.tensor([1.0, -2.0]), activation=8)
    model = nn.Module()
    model.x, model.scale = layer, nn.Parameter(torch.ones(3))
    tensors = {f"x.{name}": tensor for name, tensor in encoded(TARGET, layer, form).items()}
    return model, form, {**tensors, "scale": model.scale.detach()}


def changed(tensors, name, change):
    return {**tensors, name: change(tensors[name].clone())}


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


def test_what_is_equal_has_no_difference(stored):
    model, form, tensors = stored
    assert tensors.keys() == {"x.weight", "x.scale", "x.bias", "scale"}
    assert verify_written(tensors, tensors, model, [form], TARGET) == 0
    assert verify_written(tensors, tensors, model, [], TARGET) == 0


SCALAR = torch.tensor(1.0)


@pytest.mark.parametrize(
    "read", [SCALAR + 1, SCALAR.bfloat16(), SCALAR.view(torch.int32), SCALAR.reshape(1), None], ids=str
)
def test_a_scalar_that_is_read_back_with_other_values_is_named_with_its_component(read):
    written = {"a": SCALAR, "nan": torch.tensor(float("nan")), "rows": torch.ones(2, 3).t()}
    check_read({name: tensor.clone() for name, tensor in written.items()}, written, component="vae", done="written")
    damaged = {name: tensor for name, tensor in {**written, "a": read}.items() if tensor is not None}
    with pytest.raises(S2QError, match=r"^vae.a: .*; nothing was written"):
        check_read(damaged, written, component="vae", done="written")
    with pytest.raises(S2QError, match=r"^vae.a: in the written file or in the checkpoint alone"):
        check_read(written, {name: tensor for name, tensor in written.items() if name != "a"}, component="vae", done="")


@pytest.mark.parametrize("name", ["scale", "x.scale", "x.bias"])
def test_a_tensor_that_is_dropped_or_added_is_named(stored, name):
    model, form, tensors = stored
    for read, written in ((without(tensors, name), tensors), (tensors, without(tensors, name))):
        with pytest.raises(S2QError, match=f"^{name}: in the written file or in the checkpoint alone"):
            verify_written(read, written, model, [form], TARGET)


@pytest.mark.parametrize("name", ["scale", "x.scale", "x.bias", "x.weight"])
def test_a_tensor_that_is_read_back_otherwise_is_named(stored, name):
    model, form, tensors = stored
    for change in (lambda tensor: tensor + 1, lambda tensor: tensor.double()):
        with pytest.raises(S2QError, match=f"^{name}: was read back with other values"):
            verify_written(changed(tensors, name, change), tensors, model, [form], TARGET)


def test_a_bias_that_was_not_written_is_noticed(stored):
    model, form, tensors = stored
    dropped = without(tensors, "x.bias")
    with pytest.raises(S2QError, match="^x: its bias is in the written file or in the checkpoint alone"):
        verify_written(dropped, dropped, model, [form], TARGET)
    model.x.bias = None
    assert verify_written(dropped, dropped, model, [form], TARGET) == 0
    with pytest.raises(S2QError, match="^x: its bias is in the written file or in the checkpoint alone"):
        verify_written(tensors, tensors, model, [form], TARGET)


@pytest.mark.parametrize(("name", "what"), [("x.scale", "weight"), ("x.bias", "bias")])
def test_what_was_written_otherwise_than_the_checkpoint_is_noticed(stored, name, what):
    model, form, tensors = stored
    slightly = changed(tensors, name, lambda tensor: tensor * (1 + 5e-6))
    assert 4e-6 < verify_written(slightly, slightly, model, [form], TARGET) < 6e-6
    more = changed(tensors, name, lambda tensor: tensor * (1 + 2e-5))
    with pytest.raises(S2QError, match=f"^x: as sdnq reads it, its {what} differs by 2.0e-05 .* at most 1.0e-05"):
        verify_written(more, more, model, [form], TARGET)
