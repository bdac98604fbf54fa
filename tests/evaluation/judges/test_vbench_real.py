"""The bridge against the real VBench, in the interpreter that S2Q_VBENCH_PYTHON names: `pytest -m vbench`.

The weights are stand-ins that the test makes: this shows that the right videos go in and the right numbers come out, on
scores that can be computed here without VBench, not what any model's quality is.
"""

import math
import os
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s2q.common.errors import InvalidInputError
from s2q.evaluation.judges.vbench import (
    VBenchOptions,
    flow_scores,
    judge_videos,
    plan_vbench,
    vbench_section,
)
from s2q.report.video import BT601, encode_mp4

PYTHON = os.environ.get("S2Q_VBENCH_PYTHON", "")
pytestmark = [
    pytest.mark.vbench,
    pytest.mark.skipif(not PYTHON, reason="S2Q_VBENCH_PYTHON names no interpreter that has VBench"),
]
SIDE = 128
STILL = "In a still frame, a stop sign"
DRIFT = (0.03, 0.04)
HUBCONF = """
import torch

def dino_vitb16(path, read_frame):
    features = [torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 8)]
    network = torch.nn.Sequential(*features)
    network.load_state_dict(torch.load(path))
    return network.eval()
"""
RAFT = f"""
import sys
import torch
from easydict import EasyDict
from vbench.third_party.RAFT.core.raft import RAFT

torch.manual_seed(0)
raft = RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False))
head, mask = raft.update_block.flow_head.conv2, raft.update_block.mask[2]
for tensor in (head.weight, mask.weight, mask.bias):
    torch.nn.init.zeros_(tensor)
head.bias.data = torch.tensor({DRIFT})
torch.save({{"module." + name: tensor for name, tensor in raft.state_dict().items()}}, sys.argv[1])
"""


@pytest.fixture(scope="module")
def projection():
    generator = torch.Generator().manual_seed(0)
    return {"2.weight": torch.randn(8, 48, generator=generator), "2.bias": torch.randn(8, generator=generator)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, projection):
    """VBench's folder of weights, with stand-ins for DINO and RAFT."""
    folder = tmp_path_factory.mktemp("cache")
    hub = folder / "dino_model" / "facebookresearch_dino_main"
    hub.mkdir(parents=True)
    (hub / "hubconf.py").write_text(HUBCONF)
    torch.save(projection, hub.parent / "dino_vitbase16_pretrain.pth")
    raft = folder / "raft_model" / "models" / "raft-things.pth"
    raft.parent.mkdir(parents=True)
    subprocess.run([PYTHON, "-c", RAFT, str(raft)], check=True, cwd=folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("PYTHONPATH", raising=False)
        yield


def write_videos(plan, side, seed):
    """Smooth random videos under the names that VBench expects; what the files show, by name."""
    generator = torch.Generator().manual_seed(seed)
    folder = plan.options.folder / side
    folder.mkdir(parents=True)
    shown = {}
    for prompt in plan.prompts:
        coarse = torch.rand(1, 3, 6, 4, 4, generator=generator)
        smooth = F.interpolate(coarse, size=(6, SIDE, SIDE), mode="trilinear")[0].permute(1, 2, 3, 0)
        path = folder / plan.file_name(prompt, 0)
        path.write_bytes(encode_mp4((smooth * 255).to(torch.uint8).numpy(), matrix=BT601))
        shown[path.name] = decoded(path)
    return shown


def decoded(path: Path) -> torch.Tensor:
    """The frames of a file, `[F, 3, H, W]` in levels of 0 to 255."""
    reader = imageio_ffmpeg.read_frames(str(path))
    next(reader)
    frames = [np.frombuffer(frame, dtype=np.uint8).reshape(SIDE, SIDE, 3) for frame in reader]
    return torch.from_numpy(np.stack(frames).copy()).permute(0, 3, 1, 2).double()


def flickering(frames):
    return 1 - float((frames[1:] - frames[:-1]).abs().mean(dim=(1, 2, 3)).mean()) / 255


def consistency(frames, projection):
    """Cosines to the frame before and to the first, of the stand-in's features."""
    resized = F.interpolate(frames, size=(224, 224), mode="bilinear")
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double().view(2, 1, 3, 1, 1)
    pooled = F.avg_pool2d((resized / 255 - mean) / std, 56).flatten(1)
    features = pooled @ projection["2.weight"].double().T + projection["2.bias"].double()
    cosine = torch.cosine_similarity
    pairs = [(cosine(features[i], features[i - 1], 0), cosine(features[i], features[0], 0)) for i in range(1, 6)]
    return sum((max(0.0, float(a)) + max(0.0, float(b))) / 2 for a, b in pairs) / len(pairs)


def test_scores_are_those_of_the_videos(cache, projection, tmp_path):
    dimensions = ("temporal_flickering", "subject_consistency", "dynamic_degree", "flow_score")
    options = VBenchOptions(python=PYTHON, folder=tmp_path, cache=cache, dimensions=dimensions)
    plan = plan_vbench(options, ["a red circle", "up/down"], videos_a_prompt=1)
    assert not plan.standard
    shown = {side: write_videos(plan, side, seed) for seed, side in enumerate(("reference", "model"))}
    reference, model = (judge_videos(plan, side) for side in ("reference", "model"))
    for side, found in (("reference", reference), ("model", model)):
        for file, frames in shown[side].items():
            assert found.videos["temporal_flickering"][file] == pytest.approx(flickering(frames), abs=1e-4)
            alike = consistency(frames, projection)
            assert found.videos["subject_consistency"][file] == pytest.approx(alike, abs=1e-4)
        means = [sum(one.values()) / 2 for one in found.videos.values()]
        assert list(found.scores.values()) == pytest.approx(means)
    assert model.videos["subject_consistency"] != reference.videos["subject_consistency"]
    # RAFT adds DRIFT twenty times at an eighth of the size; upsampling averages 3 × 3 cells, zeros beyond the edge.
    cells = SIDE // 8
    length = 8 * 20 * math.hypot(*DRIFT) * ((3 * cells - 2) / (3 * cells)) ** 2
    assert flow_scores(model, reference) == pytest.approx({"model": length, "reference": length}, rel=1e-4)
    section = vbench_section(plan, model, reference)
    assert section["dimensions"]["dynamic_degree"]["model"] == 100.0
    assert section["version"]


def test_its_own_prompts_are_told_by_their_names(cache, tmp_path):
    options = VBenchOptions(python=PYTHON, folder=tmp_path, cache=cache, dimensions=("temporal_flickering",))
    plan = plan_vbench(options, [STILL, "alley"], videos_a_prompt=1)
    assert plan.standard
    assert plan.judged == {"temporal_flickering": (STILL,)}
    assert plan.own_prompts == {"temporal_flickering": 75}
    shown = write_videos(plan, "model", 0)
    found = judge_videos(plan, "model")
    assert found.scores["temporal_flickering"] == pytest.approx(flickering(shown[f"{STILL}-0.mp4"]), abs=1e-4)
    assert list(found.videos["temporal_flickering"]) == [f"{STILL}-0.mp4"]


def test_missing_weights_are_named_before_anything_is_generated(cache, tmp_path):
    options = VBenchOptions(python=PYTHON, folder=tmp_path, cache=cache, dimensions=("motion_smoothness",))
    with pytest.raises(InvalidInputError, match=r"motion_smoothness: .*weights are missing.*amt-s\.pth"):
        plan_vbench(options, ["a red circle"], videos_a_prompt=1)
    options = VBenchOptions(python=PYTHON, folder=tmp_path, cache=cache, dimensions=("scene",))
    with pytest.raises(InvalidInputError, match="scene: VBench judges it on its own prompts only"):
        plan_vbench(options, ["a red circle"], videos_a_prompt=1)
