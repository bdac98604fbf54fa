"""What a packed linear stores is rounded once, to what files have."""

import pytest
import torch

from s2q.core.stored_form import FLOAT8, file_dtypes, from_file, packed_dtypes, stored_values, to_file


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
