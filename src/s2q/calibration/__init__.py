"""Calibration: what the full-precision model sees while it generates.

`settings` says how a video is generated and checks it against the pipeline, `sharing` which of its transformers takes
which steps, `denoising` runs the pipeline so that a video depends on its prompt and seed alone, `trajectory` records
the inputs and outputs of the transformers on the way.
`salience` scores the denoising steps of a few prompts, and `selection` takes those to calibrate with.
"""
