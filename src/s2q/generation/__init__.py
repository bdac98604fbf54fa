"""Running a diffusers pipeline: load a model, resolve its settings, denoise, record, decode."""
