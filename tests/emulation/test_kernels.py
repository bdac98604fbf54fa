"""A run and a video on the Triton kernels themselves: in the interpreter where the GPU is emulated."""

import pytest

from emulation import runs

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]


@pytest.mark.parametrize("recipe", ["rtn-w4a16", "s2q-w4a6"])
def test_kernels_give_what_the_cpu_gives(recipe, device):
    runs.check_against_cpu("cogvideox", recipe, device, call={"num_inference_steps": 1})
