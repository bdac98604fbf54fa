"""s2q: 4-bit text-to-video diffusion transformers at the quality of full precision, for any diffusers pipeline."""
