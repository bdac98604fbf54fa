"""Trainers of the embedded models: ``python -m s2q.shapes.training`` rebuilds the shipped weights from nothing."""
