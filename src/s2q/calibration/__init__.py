"""Calibration: what the full-precision model sees while it generates.

`settings` says how a video is generated and checks it against the pipeline, `sharing` which of its transformers takes
which steps, `denoising` runs the pipeline so that a video depends on its prompt and seed alone, `trajectory` records
the inputs and outputs of the transformers on the way.
`salience` scores the denoising steps of a few prompts, and `selection` takes those to calibrate with.
"""

from s2q.calibration.denoising import Denoised, denoise, initial_noise
from s2q.calibration.salience import (
    Candidate,
    CandidatePool,
    diffusion_salience,
    quantization_salience,
    score_trajectory,
)
from s2q.calibration.selection import SELECTIONS, Selection
from s2q.calibration.settings import (
    GenerationSettings,
    check_prompts,
    prompt_token_limit,
    resolve_settings,
    takes_prompts_alone,
    video_tokens,
)
from s2q.calibration.sharing import steps_of_transformers
from s2q.calibration.trajectory import Trajectory, TransformerCall, record_trajectory

__all__ = [
    "SELECTIONS",
    "Candidate",
    "CandidatePool",
    "Denoised",
    "GenerationSettings",
    "Selection",
    "Trajectory",
    "TransformerCall",
    "check_prompts",
    "denoise",
    "diffusion_salience",
    "initial_noise",
    "prompt_token_limit",
    "quantization_salience",
    "record_trajectory",
    "resolve_settings",
    "score_trajectory",
    "steps_of_transformers",
    "takes_prompts_alone",
    "video_tokens",
]
