"""Fixtures of the tests of ops."""

import pytest


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param
