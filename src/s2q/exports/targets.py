"""The targets of `s2q export` by name."""

from collections.abc import Mapping

from s2q.exports.comfyui import COMFYUI
from s2q.exports.dense import DENSE
from s2q.exports.gguf import GGUF
from s2q.exports.sdnq import SDNQ
from s2q.exports.target import Target

TARGETS: Mapping[str, Target] = {target.name: target for target in (DENSE, SDNQ, COMFYUI, GGUF)}
"""Every target by the name that `--to` takes."""
