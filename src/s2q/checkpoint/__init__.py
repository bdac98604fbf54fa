"""Checkpoints: format, save, load, the quantizer that diffusers' loader calls, manifest, model card.

Importing this package registers the quantizer with diffusers; `import s2q` sees to it that this happens in time.
"""

from s2q.checkpoint.config import FORMAT_VERSION, S2QConfig
from s2q.checkpoint.inspect import CheckpointReport, fused_loras, inspect_checkpoint
from s2q.checkpoint.load import load_pipeline, read_config, read_configs
from s2q.checkpoint.manifest import MANIFEST, check_intact, owned_files, verify_manifest, write_manifest
from s2q.checkpoint.quantizer import QUANT_METHOD, S2QQuantizer, attach_config, file_tensors, register
from s2q.checkpoint.save import CheckpointRecords, save_checkpoint

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "QUANT_METHOD",
    "CheckpointRecords",
    "CheckpointReport",
    "S2QConfig",
    "S2QQuantizer",
    "attach_config",
    "check_intact",
    "file_tensors",
    "fused_loras",
    "inspect_checkpoint",
    "load_pipeline",
    "owned_files",
    "read_config",
    "read_configs",
    "register",
    "save_checkpoint",
    "verify_manifest",
    "write_manifest",
]

register()
