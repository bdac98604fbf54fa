"""A quantization run: plan, collect, select, blocks, assemble, report."""
