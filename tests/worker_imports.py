"""What workers import, for the server that they are forked from (`forked_workers` of conftest.py)."""

import transformers  # noqa: F401
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel  # noqa: F401
from transformers import T5EncoderModel  # noqa: F401

import s2q.comparison.compare
import s2q.evaluation.evaluate
import s2q.generation.generate
import s2q.run.quantize  # noqa: F401
