"""Two models side by side on every GPU, against the CPU."""

import numpy as np
import pytest

from emulation import runs
from s2q.common.progress import silent
from s2q.generation.prompts import prompt_list
from s2q.ui.offers import offered
from s2q.ui.pipelines import Pipelines
from s2q.ui.side_by_side import generate_side_by_side

pytestmark = pytest.mark.gpu

SIZES = {"num_frames": 9, "height": 16, "width": 16, "num_inference_steps": 2}


@pytest.mark.parametrize("offload", ["none", "model"])
def test_videos_and_metrics_are_those_of_the_cpu(each_device, offload, tmp_path):
    models = [runs.model_folder("cogvideox")], [runs.on_cpu("cogvideox", "rtn-w4a6").folder]
    left, right = offered(*models)
    (prompt,) = prompt_list("prompts", ["red"])
    results = [
        generate_side_by_side(
            left,
            right,
            prompt=prompt,
            seed=0,
            requested=SIZES,
            velocity=True,
            pipelines=Pipelines(tmp_path, device=device, offload=way),
            progress=silent,
        )
        for device, way in ((each_device, offload), ("cpu", "auto"))
    ]
    on_gpu, on_cpu = results
    assert np.abs(on_gpu.pair.reference.astype(int) - on_cpu.pair.reference).max() <= 1
    name = "velocity_relative_error"
    assert on_gpu.pair.metrics[name] == pytest.approx(on_cpu.pair.metrics[name], rel=0.1)
    assert on_gpu.right.working_bytes is not None
    assert on_gpu.right.weight_bytes == on_cpu.right.weight_bytes
