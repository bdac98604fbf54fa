import math

import pytest
import torch

from s2q.common.errors import InvalidInputError
from s2q.evaluation.definitions import definition_of, metric_table, statistics_definitions
from s2q.evaluation.intervals import CONFIDENCE, MIN_PROMPTS, RESAMPLES
from s2q.evaluation.judges.clip_score import CLIP_METRICS
from s2q.evaluation.judges.learned import LPIPS
from s2q.evaluation.metrics import (
    FRAME_METRICS,
    PSNR_CAP_DB,
    SSIM_SIGMA,
    SSIM_WINDOW,
    black_frames,
    first_frame_psnr_db,
    flicker_rms,
    latent_cosine,
    latent_relative_l2,
    motion_ratio,
    psnr_frame_mean_db,
    psnr_pooled_db,
    ssim,
)
from s2q.evaluation.paired import RANKED_BY, RATIOS, SIGNIFICANCE
from s2q.evaluation.video_metrics import METRICS


def random_frames(seed: int = 0, *, frames: int = 3, height: int = 16, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), generator=generator, dtype=torch.uint8)


def test_identical_videos_have_no_error():
    frames, latents = random_frames(), torch.randn(3, 4, 2, 2)
    assert latent_relative_l2(latents, latents) == 0.0
    assert latent_cosine(latents, latents) == pytest.approx(1.0)
    assert psnr_frame_mean_db(frames, frames) == psnr_pooled_db(frames, frames) == PSNR_CAP_DB
    assert ssim(frames, frames) == pytest.approx(1.0)


def test_every_metric_is_defined():
    assert {*METRICS, LPIPS, *CLIP_METRICS, "adherence_all_change"} == set(metric_table())
    for name in ("psnr_frame_mean_db", "psnr_pooled_db"):
        assert f"capped at {PSNR_CAP_DB:g} dB" in definition_of(name)
    assert f"{SSIM_WINDOW} pixels" in definition_of("ssim")
    assert f"sigma {SSIM_SIGMA}" in definition_of("ssim")
    assert definition_of("reference_ssim") == definition_of("ssim") + "; of the full-precision reference's videos"


def test_the_statistics_are_defined_by_what_computes_them():
    definitions = statistics_definitions()
    for text in (f"{CONFIDENCE * 100:g} % interval", f"BCa, {RESAMPLES} resamples"):
        assert text in definitions["difference"]
    assert f"for {' and '.join(RATIOS)}:" in definitions["ratio"]
    assert f"at most {RESAMPLES}, else {RESAMPLES} random" in definitions["p"]
    assert f"p_holm is below {SIGNIFICANCE:g};" in definitions["winner"]
    assert f"below {MIN_PROMPTS} prompts" in definitions["winner"]
    assert definitions["ranking"].endswith(", ".join(RANKED_BY))


def test_latent_metrics_against_known_values():
    reference = torch.tensor([3.0, 4.0])
    assert latent_relative_l2(torch.tensor([3.0, 3.0]), reference) == pytest.approx(1 / 5)
    assert latent_relative_l2(2 * reference, reference) == pytest.approx(1.0)
    assert latent_cosine(2 * reference, reference) == pytest.approx(1.0)
    assert latent_cosine(-reference, reference) == pytest.approx(-1.0)
    assert latent_cosine(torch.tensor([-4.0, 3.0]), reference) == pytest.approx(0.0)


def test_frame_mean_and_pooled_psnr_differ_as_they_should():
    reference = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    frames = reference.clone()
    frames[0] += 1
    frames[1] += 16
    per_frame = [10 * math.log10(255**2 / 1), 10 * math.log10(255**2 / 256)]
    assert psnr_frame_mean_db(frames, reference) == pytest.approx(sum(per_frame) / 2)
    assert psnr_pooled_db(frames, reference) == pytest.approx(10 * math.log10(255**2 / 128.5))


def test_psnr_has_no_uint8_wraparound():
    black, white = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.full((1, 8, 8, 3), 255, dtype=torch.uint8)
    assert psnr_pooled_db(black, white) == psnr_pooled_db(white, black) == 0.0


def test_flicker_against_known_values():
    reference = random_frames(frames=3, height=2, width=2) // 2 + 50
    assert flicker_rms(reference + 7, reference) == 0.0, "an error that stays the same does not flicker"
    frames = reference.clone()
    frames[1] -= 4
    assert flicker_rms(frames, reference) == 4.0, "there and back: a change of 4 levels each time"
    frames = reference.clone()
    frames[2, 0, 0, 0] += 6  # one of 12 values changes by 6, in the second of two steps
    assert flicker_rms(frames, reference) == pytest.approx((0 + math.sqrt(36 / 12)) / 2)
    assert flicker_rms(reference, frames) == pytest.approx(flicker_rms(frames, reference))
    assert flicker_rms(reference[:1], reference[:1]) is None


def test_flicker_sees_what_frame_by_frame_metrics_do_not():
    reference = torch.full((4, 2, 2, 3), 100, dtype=torch.uint8)
    steady = reference + 5
    restless = reference + 5
    restless[1::2] -= 10
    assert psnr_pooled_db(steady, reference) == pytest.approx(psnr_pooled_db(restless, reference))
    assert (flicker_rms(steady, reference), flicker_rms(restless, reference)) == (0.0, 10.0)


def brute_force_ssim(x: torch.Tensor, y: torch.Tensor, window: int) -> float:
    weights = [math.exp(-((i - (window - 1) / 2) ** 2) / (2 * 1.5**2)) for i in range(window)]
    kernel = torch.tensor([[a * b for b in weights] for a in weights], dtype=torch.float64)
    kernel /= kernel.sum()
    scores = []
    for frame_x, frame_y in zip(x.double(), y.double(), strict=True):
        luma_x, luma_y = (f @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64) for f in (frame_x, frame_y))
        for top in range(luma_x.shape[0] - window + 1):
            for left in range(luma_x.shape[1] - window + 1):
                a, b = (luma[top : top + window, left : left + window] for luma in (luma_x, luma_y))
                mean_a, mean_b = (kernel * a).sum(), (kernel * b).sum()
                var_a, var_b = (kernel * (a - mean_a) ** 2).sum(), (kernel * (b - mean_b) ** 2).sum()
                cov = (kernel * (a - mean_a) * (b - mean_b)).sum()
                c1, c2 = 2.55**2, 7.65**2
                scores.append(
                    (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
                )
    return float(torch.stack(scores).mean())


@pytest.mark.parametrize(("height", "width", "window"), [(13, 16, 11), (8, 12, 7), (7, 7, 7), (2, 9, 1)])
def test_ssim_against_brute_force(height, width, window):
    x = random_frames(1, frames=2, height=height, width=width)
    y = (x.float() * 0.7 + random_frames(2, frames=2, height=height, width=width).float() * 0.3).to(torch.uint8)
    assert ssim(y, x) == pytest.approx(brute_force_ssim(x, y, window), abs=1e-10)
    assert ssim(y, x) == pytest.approx(ssim(x, y))
    assert ssim(y, x) < 0.99


@pytest.mark.parametrize("metric", list(FRAME_METRICS.values()))
def test_frame_metrics_refuse_other_shapes_and_dtypes(metric):
    frames = random_frames()
    with pytest.raises(InvalidInputError, match="shape"):
        metric(frames[:2], frames)
    with pytest.raises(InvalidInputError, match="uint8"):
        metric(frames.float(), frames.float())
    with pytest.raises(InvalidInputError, match=r"\[F, H, W, 3\]"):
        metric(frames.permute(0, 3, 1, 2), frames.permute(0, 3, 1, 2))


def test_latent_metrics_refuse_other_shapes_and_a_zero_reference():
    with pytest.raises(InvalidInputError, match="shape"):
        latent_cosine(torch.ones(3), torch.ones(4))
    with pytest.raises(InvalidInputError, match="all zero"):
        latent_relative_l2(torch.ones(3), torch.zeros(3))
    assert latent_cosine(torch.ones(3), torch.zeros(3)) == 0.0


def test_motion_is_relative_to_the_reference():
    fast = (torch.arange(6) * 20).to(torch.uint8).view(6, 1, 1, 1).expand(6, 4, 4, 3)
    slow = fast // 4
    assert motion_ratio(slow, fast) == pytest.approx(0.25)
    assert motion_ratio(fast, slow) == pytest.approx(4.0)
    assert motion_ratio(slow + 7, slow) == pytest.approx(1.0), "a constant error is no motion"
    still = fast[:1].expand(6, 4, 4, 3)
    assert motion_ratio(still, fast) == 0.0
    assert motion_ratio(fast, still) is None
    nearly, moving = still.clone(), still.clone()
    nearly[1::2, 0, 0] += 1  # one of 16 pixels by 1 level: rms 0.25
    moving[1::2, :2, :2] += 1  # four of them: rms 0.5
    assert motion_ratio(fast, nearly) is None
    assert motion_ratio(fast, moving) == pytest.approx(40.0)
    assert motion_ratio(fast[:1], fast[:1]) is None


def test_the_first_frame_alone_is_compared_with_the_image():
    image = torch.randint(0, 200, (4, 6, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    frames = torch.stack([image + 5, image, image])
    assert first_frame_psnr_db(frames, image) == pytest.approx(20 * math.log10(255 / 5))
    assert first_frame_psnr_db(frames[1:], image) == 100.0
    with pytest.raises(InvalidInputError, match="shape"):
        first_frame_psnr_db(frames, image[:3])


def test_frames_are_black_where_nearly_all_pixels_are():
    frames = torch.full((4, 10, 20, 3), 16, dtype=torch.uint8)
    frames[1, 0, :2] = 255  # 1 % of the pixels
    frames[2, 0, :3] = 255
    frames[3] = 17
    assert black_frames(frames) == 0.5
    blue = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    blue[..., 2] = 255
    assert black_frames(blue) == 0.0, "its luma is 29"
