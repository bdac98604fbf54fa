"""What weight-only text encoders change on an embedded model whose transformer is in full precision; held-out prompts.

    python benchmarks/text_encoders.py -m shapes-wan [--prompts 12]

Three figures for each setting of `text_encoder`, into ``benchmarks/results/text-encoders/MODEL.json``: the relative
squared error of the embeddings, ‖E_q − E‖² / ‖E‖²; the velocity error, of the full-precision transformer that is given
these embeddings on the full-precision trajectory; and the PSNR of videos of the same seeds.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from environment import environment
from records import rounded, write_record

import s2q
from s2q.common.components import transformers_of
from s2q.evaluation.intervals import clustered_mean
from s2q.evaluation.metrics import psnr_frame_mean_db
from s2q.evaluation.velocity import velocity_errors
from s2q.generation.defaults import generation_defaults
from s2q.generation.load import load_pipeline
from s2q.generation.settings import resolve_settings
from s2q.generation.trajectory import Trajectory, record_trajectory
from s2q.shapes.embedded import EMBEDDED_NAMES, embedded_folder, embedded_prompts, starts_from_image

TEXT_TO_VIDEO = [name for name in EMBEDDED_NAMES if not starts_from_image(name)]
RESULTS = Path(__file__).parent / "results" / "text-encoders"
GROUPED = ["text_encoder.granularity=per_group", "text_encoder.group_size=32"]
TABLE = ["text_encoder.levels=table", "text_encoder.granularity=per_group", "text_encoder.group_size=16"]
SETTINGS = {
    "8 bits": ["text_encoder.num_bits=8"],
    "4 bits": ["text_encoder.num_bits=4"],
    "4 bits, groups of 32": ["text_encoder.num_bits=4", *GROUPED],
    "4 bits, table, groups of 16": ["text_encoder.num_bits=4", *TABLE],
}
TEXT = "encoder_hidden_states"


def quantized_encoder(model: str, overrides: list[str]) -> DiffusionPipeline:
    """Load an embedded model whose text encoder alone is quantized, in fp32."""
    config = s2q.Config("rtn-w4a8", overrides=overrides, components=["text_encoder"])
    folder = embedded_folder(model)
    pipe = DiffusionPipeline.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_text(reference: Trajectory, other: Trajectory) -> Trajectory:
    """Return a trajectory whose calls get the embeddings of another one of the same prompts."""
    pairs = zip(reference.calls, other.calls, strict=True)
    calls = (replace(call, inputs={**call.inputs, TEXT: given.inputs[TEXT]}) for call, given in pairs)
    return replace(reference, calls=tuple(calls))


def differences(reference: Trajectory, other: Trajectory, transformers: dict) -> list[dict[str, float]]:
    """Return the figures of each video."""
    full, quantized = (trajectory.calls[0].inputs[TEXT].double() for trajectory in (reference, other))
    velocity = velocity_errors(transformers, with_text(reference, other))
    videos = []
    for video, prompt in enumerate(reference.prompts):
        rows = reference.rows_of(reference.calls[0], video)
        videos.append(
            {
                "prompt": prompt,
                "embedding_relative_error": float(
                    (quantized[rows] - full[rows]).square().sum() / full[rows].square().sum()
                ),
                "velocity_relative_error": statistics.fmean(velocity[video]),
                "psnr_db": psnr_frame_mean_db(other.frames[video], reference.frames[video]),
            }
        )
    return videos


def measure(model: str, *, prompts: int) -> dict:
    """Return the record of a model."""
    captions = embedded_prompts(model, split="held-out", count=prompts)
    pipe = load_pipeline(model, dtype="float32")
    settings = resolve_settings(pipe, requested={}, defaults=generation_defaults(model))

    def recorded(pipeline: DiffusionPipeline) -> Trajectory:
        return record_trajectory(pipeline, captions, seeds=[0] * len(captions), settings=settings, decode=True)

    reference, results = recorded(pipe), {}
    for name, overrides in SETTINGS.items():
        videos = differences(reference, recorded(quantized_encoder(model, overrides)), transformers_of(pipe))
        figures = [key for key in videos[0] if key != "prompt"]
        results[name] = {
            "overrides": overrides,
            **{key: vars(clustered_mean({video["prompt"]: [video[key]] for video in videos})) for key in figures},
            "videos": [
                {key: value if key == "prompt" else rounded(value) for key, value in video.items()} for video in videos
            ],
        }
    return {"model": model, "prompts": prompts, "settings": results}


def main() -> None:
    """Measure a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", required=True, choices=TEXT_TO_VIDEO)
    parser.add_argument("--prompts", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = measure(arguments.model, prompts=arguments.prompts)
    write_record(RESULTS / f"{arguments.model}.json", record | environment())
    for name, result in record["settings"].items():
        means = (f"{key} {value['mean']:.3g}" for key, value in result.items() if isinstance(value, dict))
        print(f"{arguments.model} {name}: {', '.join(means)}")


if __name__ == "__main__":
    main()
