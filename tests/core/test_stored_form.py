"""What a packed linear stores is rounded once, to what files have."""

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.core.input_path import PARTS, InputPart, StoredTensor, stored_tensors
from s2q.core.stored_form import FLOAT8, file_dtypes, file_form, from_file, packed_dtypes, stored_values, to_file


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("name", [name for name, dtype in packed_dtypes().items() if dtype.is_floating_point])
def test_writing_and_reading_stored_values_changes_no_bit(name):
    values = stored_values(name, draw(96, 3) / 8)
    assert values.dtype == packed_dtypes()[name]
    written = to_file(values, file_dtypes()[name])
    assert written.dtype == file_dtypes()[name]
    assert torch.equal(from_file(written, packed_dtypes()[name]), values)
    assert torch.equal(stored_values(name, values), values)


@pytest.mark.parametrize("features", [1, 24, 192, 3072, 65536])
def test_a_basis_in_float8_is_within_its_precision(features):
    basis = draw(features, 3)
    basis /= basis.norm(dim=0)
    stored = stored_values("low_rank_basis", basis)
    assert to_file(stored, file_dtypes()["low_rank_basis"]).dtype == FLOAT8
    assert float((stored.float() - basis).norm() / basis.norm()) < 2**-4
    assert bool(stored.isfinite().all())


def test_the_gradient_passes_as_if_nothing_were_rounded():
    values = draw(64).requires_grad_()
    stored = stored_values("weight_scale", values)
    assert torch.equal(stored.detach(), values.detach().bfloat16().float())
    (gradient,) = torch.autograd.grad((stored * draw(64)).sum(), values)
    assert torch.equal(gradient, draw(64))


ROUNDED = sorted(name for name, dtype in packed_dtypes().items() if file_dtypes()[name] != dtype)


@pytest.mark.parametrize("name", ROUNDED)
def test_values_that_a_file_would_round_are_refused(name):
    values = stored_values(name, draw(24, 3) / 8)
    changed = values.clone()
    changed[5, 1] *= 1 + 2**-7 if values.dtype == torch.bfloat16 else 1 + 2**-12
    assert file_form({f"proj.{name}": values})[f"proj.{name}"].dtype == file_dtypes()[name]
    with pytest.raises(InvalidInputError, match=rf"proj\.{name}: got values that torch\.\w+, .* would change"):
        file_form({f"proj.{name}": changed, "proj.bias": values})
    assert file_form({f"proj.{name}": changed}, wide=True)[f"proj.{name}"] is changed


def test_tensors_that_are_not_rounded_are_written_unchanged():
    tensors = {"proj.bias": draw(3), "proj.activation_clip": draw(1), "proj.weight": draw(3).to(torch.uint8)}
    assert all(written is tensors[name] for name, written in file_form(tensors).items())
    assert stored_values("activation_clip", tensors["proj.activation_clip"]) is tensors["proj.activation_clip"]


def test_the_dtypes_are_those_of_the_parts_at_the_time(monkeypatch):
    before = dict(file_dtypes())
    part = InputPart(tensors={"row_sums": StoredTensor(lambda i, o, size: (o, 1), file_dtype="BF16")})
    with monkeypatch.context() as patch:
        patch.setitem(PARTS, "token_mean", part)
        assert file_dtypes() == before | {"row_sums": torch.bfloat16}
        assert packed_dtypes()["row_sums"] == torch.float32
        assert stored_tensors()["row_sums"] is part.tensors["row_sums"]
        assert packed_dtypes() is packed_dtypes()
    assert file_dtypes() == before
    assert "row_sums" not in stored_tensors()


@pytest.mark.parametrize(("features", "unit"), [(24, 4), (192, 16), (3072, 64), (65536, 256)])
def test_the_unit_of_a_basis_is_a_power_of_two_near_the_root_of_its_features(features, unit):
    basis = torch.full((features, 1), 2**-8, dtype=torch.bfloat16)
    assert bool((to_file(basis, FLOAT8).float() == unit * 2**-8).all())


def test_golden_bytes_of_a_basis():
    """24 features, unit 4: 0.5 -> 2 = 0x40, -0.25 -> -1 = 0xB8, 0.3 -> 1.25 = 0x3A, 2^-11 -> 2^-9 = 0x01, 0 -> 0."""
    basis = torch.zeros(24, 1)
    basis[:5, 0] = torch.tensor([0.5, -0.25, 0.3, 2**-11, -0.0])
    written = to_file(stored_values("low_rank_basis", basis), FLOAT8)
    assert written.view(torch.uint8).flatten().tolist() == [0x40, 0xB8, 0x3A, 0x01, 0x80] + [0] * 19
    assert from_file(written, torch.bfloat16)[:5, 0].tolist() == [0.5, -0.25, 0.3125, 2**-11, 0]
