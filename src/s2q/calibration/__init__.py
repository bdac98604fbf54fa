"""Calibration: candidates of a few prompts, their selection, and what the teacher does in each block on them.

`candidates` generates and scores, `artefacts` stores the calls, `calibration_set` selects, `stream` carries the samples
through the blocks, `observe` records targets, token weights and input statistics.
"""
