import pytest


@pytest.fixture(scope="session")
def checkpoint(tiny_model, tmp_path_factory):
    """The tiny model, quantized."""
    import s2q

    out = tmp_path_factory.mktemp("offered") / "tiny-w4a6"
    s2q.quantize(tiny_model, recipe="rtn-w4a6", out=out)
    return out
