"""Checkpoints: format, save, load, the quantizer that diffusers' loader calls, manifest, model card.

Importing this package registers the quantizer with diffusers; `import s2q` sees to it that this happens in time.
"""

from s2q.checkpoint.config import FORMAT_VERSION, S2QConfig
from s2q.checkpoint.inspect import CheckpointReport, InspectedLayer, inspect_checkpoint
from s2q.checkpoint.load import load_pipeline, read_config
from s2q.checkpoint.manifest import check_intact, verify_manifest, write_manifest
from s2q.checkpoint.quantizer import S2QQuantizer, attach_config
from s2q.checkpoint.save import OVERWRITABLE, CheckpointRecords, save_checkpoint


def register() -> None:
    """Make diffusers' `from_pretrained` know checkpoints of this package; doing it again changes nothing.

    diffusers has no entry point for quantizers, only two dicts.
    """
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    from s2q.checkpoint.config import QuantMethod

    AUTO_QUANTIZER_MAPPING[QuantMethod.S2Q.value] = S2QQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.S2Q.value] = S2QConfig


__all__ = [
    "FORMAT_VERSION",
    "OVERWRITABLE",
    "CheckpointRecords",
    "CheckpointReport",
    "InspectedLayer",
    "S2QConfig",
    "S2QQuantizer",
    "attach_config",
    "check_intact",
    "inspect_checkpoint",
    "load_pipeline",
    "read_config",
    "register",
    "save_checkpoint",
    "verify_manifest",
    "write_manifest",
]

register()
