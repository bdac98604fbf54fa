"""Checkpoints as files of other programs, and such files as checkpoints: what each format stores, checked once."""
