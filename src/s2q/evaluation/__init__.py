"""Evaluation: generating videos, measuring them against full precision, and saying how sure the figures are."""

from s2q.evaluation.evaluate import (
    EvaluationOptions,
    default_prompts,
    evaluate,
    evaluate_each,
)
from s2q.evaluation.generate import Progress, Video, generate
from s2q.evaluation.prompts import read_prompts
from s2q.evaluation.sources import embedded_source, generation_defaults, model_label
from s2q.evaluation.statistics import Estimate, clustered_mean
from s2q.evaluation.video_metrics import METRICS, compare_videos, selected_metrics

__all__ = [
    "METRICS",
    "Estimate",
    "EvaluationOptions",
    "Progress",
    "Video",
    "clustered_mean",
    "compare_videos",
    "default_prompts",
    "embedded_source",
    "evaluate",
    "evaluate_each",
    "generate",
    "generation_defaults",
    "model_label",
    "read_prompts",
    "selected_metrics",
]
