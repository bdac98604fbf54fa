import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from s2q.common.errors import InvalidInputError
from s2q.evaluation.judges.clip_score import CLIP_METRICS, ClipJudge, _as_clip_does
from tiny_judges import CONTEXT, SIDE, save_tiny_clip

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def frames(*, count=20, height=SIDE, width=SIDE):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


@torch.no_grad()
def model_cosines(folder, prompt, pixels):
    """Cosines of the whole model's own output, and its image embeddings."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    assert tokens["input_ids"].shape[1] <= CONTEXT
    output = model(**tokens, pixel_values=pixels)
    return output.logits_per_image[:, 0] / model.logit_scale.exp(), output.image_embeds


def test_scores_are_those_of_the_models_own_output(folder):
    video, prompt = frames(), "a cat"
    found = ClipJudge(folder).measure(prompt, video)
    assert set(found) == set(CLIP_METRICS)
    levels = video.permute(0, 3, 1, 2).float()
    cosines, _ = model_cosines(folder, prompt, (levels / 255 - MEAN) / STD)
    assert found["clip_score"] == pytest.approx(100 * float(cosines.clamp(min=0).mean()), abs=1e-4)
    cosines, images = model_cosines(folder, prompt, levels)
    assert found["clipsim"] == pytest.approx(float(cosines.mean()), abs=1e-5)
    temporal = torch.cosine_similarity(images[1:], images[:-1]).mean()
    assert found["clip_temp"] == pytest.approx(float(temporal), abs=1e-5)


def test_evalcrafter_squeezes_frames_and_keeps_their_levels(folder):
    video = frames(count=2, height=48, width=80)
    squeezed = F.interpolate(video.permute(0, 3, 1, 2).float(), size=(SIDE, SIDE), mode="bilinear")
    cosines, _ = model_cosines(folder, "a dog", squeezed)
    assert ClipJudge(folder).measure("a dog", video)["clipsim"] == pytest.approx(float(cosines.mean()), abs=1e-5)


@pytest.mark.parametrize(("height", "width"), [(48, 81), (81, 48), (20, 33), (SIDE, SIDE)])
def test_preprocessing_is_transformers(height, width):
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    video = frames(count=2, height=height, width=width)
    expected = processor(list(video.numpy()), return_tensors="pt")["pixel_values"]
    assert torch.allclose(_as_clip_does(video, SIDE), expected, atol=1e-5)


def test_one_frame_has_no_temporal_score_and_long_prompts_are_cut(folder):
    judge = ClipJudge(folder)
    found = judge.measure("a very long prompt of many letters", frames(count=1))
    assert found["clip_temp"] is None
    assert found == judge.measure("a very long prompt of many letters and more", frames(count=1))


def test_folders_without_a_clip_model_are_refused(tmp_path, folder):
    with pytest.raises(InvalidInputError, match="not a folder with a CLIP model"):
        ClipJudge(tmp_path / "missing")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InvalidInputError, match="cannot be read as a CLIP model"):
        ClipJudge(tmp_path)
