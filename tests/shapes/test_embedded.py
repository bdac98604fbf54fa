"""The embedded models: complete, small, of the promised quality; the stress variant is the same function."""

import json
import math

import pytest
import torch

from quick import quick
from s2q.common.devices import default_dtype
from s2q.common.errors import InvalidInputError
from s2q.generation.settings import prompt_token_limit
from s2q.shapes.detector import detect
from s2q.shapes.embedded import (
    EMBEDDED_NAMES,
    PROMPT_SPLITS,
    embedded_folder,
    embedded_pipeline,
    embedded_prompts,
    first_frame,
    generation_defaults,
    starts_from_image,
)
from s2q.shapes.outliers import OUTLIER_SCALE
from s2q.shapes.scenes import is_held_out, parse_caption
from training.quality import adherence, first_frame_psnr, sample

MODEL, STRESS, WAN, WAN_STRESS, IMAGE = EMBEDDED_NAMES
TRAINED = (MODEL, WAN, IMAGE)


@pytest.mark.parametrize("model", TRAINED)
def test_folder_is_small_and_holds_no_pickle(model):
    files = [path for path in embedded_folder(model).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".png"}


def test_there_are_at_least_192_video_tokens():
    config = json.loads((embedded_folder(MODEL) / "transformer" / "config.json").read_text())
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    assert frames * config["sample_height"] * config["sample_width"] // config["patch_size"] ** 2 >= 192


@pytest.mark.parametrize("split", PROMPT_SPLITS)
def test_prompts_are_distinct_fixed_and_of_their_split(split):
    prompts = embedded_prompts(MODEL, split=split)
    assert len(set(prompts)) == len(prompts) >= 4
    assert prompts[:3] == embedded_prompts(STRESS, split=split, count=3)
    for prompt in prompts:
        labels = parse_caption(prompt)
        assert labels is not None
        assert is_held_out(labels) == (split != "calibration")


def test_bad_names_and_counts_are_refused():
    with pytest.raises(InvalidInputError, match="shapes-cogvideox"):
        embedded_folder("shapes-cogvideo")
    with pytest.raises(InvalidInputError, match="held-out"):
        embedded_prompts(MODEL, split="heldout")
    with pytest.raises(InvalidInputError, match="request fewer"):
        embedded_prompts(MODEL, count=10_000)


@pytest.mark.parametrize("model", TRAINED)
def test_every_prompt_fits_the_text_encoder_in_whole_words(model):
    pipeline = embedded_pipeline(model, dtype=torch.bfloat16)
    limit = prompt_token_limit(pipeline)
    assert limit == 16
    unknown = pipeline.tokenizer.unk_token_id
    for split in PROMPT_SPLITS:
        for prompt in embedded_prompts(MODEL, split=split):
            for text in (prompt, prompt.capitalize() + "."):
                ids = pipeline.tokenizer(text).input_ids
                assert len(ids) <= limit
                assert unknown not in ids
                assert len(ids) <= len(text.split()) + 3  # a piece a word, comma, full stop, end


@pytest.mark.parametrize("model", quick(TRAINED, "shapes-cogvideox"))
def test_full_precision_videos_show_what_the_prompt_says(own_arithmetic, model):
    prompts = embedded_prompts(model, count=12)
    settings = generation_defaults(model) | {"num_inference_steps": 12}
    images = [first_frame(model, prompt) for prompt in prompts] if starts_from_image(model) else None
    pipeline = embedded_pipeline(model, dtype=default_dtype(torch.bfloat16, "cpu"))
    videos = sample(pipeline, prompts, images=images, seed=5, **settings)
    found = adherence(prompts, videos)
    assert min(found["colour"], found["background"], found["motion"]) >= 0.8, found
    assert found["shape"] >= 0.75, found
    assert float((videos[0] - videos[1]).abs().mean()) > 0.05
    again = sample(pipeline, prompts[:1], images=images, seed=6, **settings)
    assert float((videos[0] - again[0]).abs().mean()) > (0.01 if images is None else 0.001)
    if images is not None:
        assert first_frame_psnr(videos, images) >= 20


def test_a_first_frame_shows_what_the_caption_says_and_is_always_the_same():
    for prompt in (*embedded_prompts(IMAGE, count=8), "on a navy background a big red square drifts slowly up"):
        frame, labels = first_frame(IMAGE, prompt), parse_caption(prompt)
        assert (frame.shape, frame.dtype) == ((32, 32, 3), torch.uint8)
        assert torch.equal(frame, first_frame(IMAGE, prompt))
        detected = detect(frame[None].expand(9, -1, -1, -1))
        assert (detected.shape, detected.colour, detected.background) == (
            labels.shape,
            labels.colour,
            labels.background,
        )
    sizes = [
        _area(first_frame(IMAGE, f"a {word} red circle moving left, white background")) for word in ("small", "big")
    ]
    assert sizes[0] < 0.75 * sizes[1]
    assert first_frame(IMAGE, "a cat") is None
    assert first_frame(WAN, "a red circle moving left on a grey background") is None


def _area(frame):
    return int((frame[..., 1] < 128).sum())


def test_the_image_model_shares_all_but_its_transformer_with_its_start():
    for part in ("tokenizer", "text_encoder", "vae", "scheduler"):
        ours, theirs = (
            {path.name: path.read_bytes() for path in (embedded_folder(model) / part).iterdir()}
            for model in (IMAGE, WAN)
        )
        assert ours == theirs, part


def record(into, name):
    return lambda _module, args: into.__setitem__(name, args[0].detach())


def stretch(x):
    spread = x.abs().flatten(0, -2).amax(0)
    return float(spread.amax() / spread.median())


@pytest.mark.parametrize(
    ("names", "readers"),
    [
        ((MODEL, STRESS), ("attn1.to_q", "ff.net.0.proj", "attn1.to_out.0")),
        ((WAN, WAN_STRESS), ("attn1.to_q", "ffn.net.0.proj", "attn2.to_q", "attn1.to_out.0", "attn2.to_out.0")),
    ],
)
def test_outliers_change_no_output_and_stretch_the_inputs(names, readers):
    generator = torch.Generator().manual_seed(0)
    frames_first = names[0] == MODEL
    inputs = {
        "hidden_states": torch.randn(*((1, 3, 16) if frames_first else (1, 16, 3)), 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 16, 128, generator=generator),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    outputs, seen = [], [{}, {}]
    for name, into in zip(names, seen, strict=True):
        transformer = embedded_pipeline(name, dtype=torch.float32).transformer
        block = (transformer.transformer_blocks if frames_first else transformer.blocks)[2]
        for reader in readers:
            block.get_submodule(reader).register_forward_pre_hook(record(into, reader))
        with torch.no_grad():
            outputs.append(transformer(**inputs)[0])
    plain, stressed = seen
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 1e-5
    for reader in readers:
        assert stretch(stressed[reader]) > 8, reader
        assert stretch(stressed[reader]) > 2 * stretch(plain[reader]), reader


def test_the_scale_of_outliers_is_a_power_of_two():
    assert math.frexp(OUTLIER_SCALE)[0] == 0.5


@pytest.mark.parametrize("model", TRAINED)
def test_the_card_has_the_promised_quality_in_few_steps(model):
    assert generation_defaults(model)["num_inference_steps"] <= 30
    card = json.loads((embedded_folder(model) / "training.json").read_text())
    (quality,) = (card[key] for key in card if key.startswith("full_precision_adherence_on_held_out_prompts"))
    assert min(quality["background"], quality["colour"]) >= 0.95
    assert quality["motion"] >= 0.90
    assert quality["shape"] >= 0.85
    assert quality.get("first_frame_psnr_db", 30) >= 23
