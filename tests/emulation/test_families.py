"""The recommended recipes on every family: quantized and generated on a GPU, against the CPU."""

import pytest
import torch

from emulation import runs
from s2q.models import FAMILIES

pytestmark = pytest.mark.gpu


def test_every_family_is_tested():
    of_text = (family for family in FAMILIES.values() if not (family.image_to_video and family.image_to_video.videos))
    assert {family.name for family in of_text} <= set(runs.MODELS)


@pytest.mark.parametrize(("recipe", "model"), runs.pairs(["s2q-w4a6", "s2q-plus-w4a6"], runs.MODELS))
def test_a_gpu_gives_what_the_cpu_gives(recipe, model, device):
    runs.check_against_cpu(model, recipe, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", ["cogvideox", "wan"])
def test_halves_give_what_the_cpu_gives(model, dtype, device):
    runs.check_against_cpu(model, "s2q-w4a6", device, dtype=dtype)
