"""Checkpoints as files of other programs: a writer for each target, one check of what a target can store."""
