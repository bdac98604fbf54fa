"""The run that carries out a recipe, stage by stage: load, blocks, assemble, report."""

from s2q.quantization.report import BlockReport, QuantizationReport
from s2q.quantization.run import Progress, QuantizeOptions, quantize

__all__ = ["BlockReport", "Progress", "QuantizationReport", "QuantizeOptions", "quantize"]
