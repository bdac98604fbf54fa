"""Trainers of the embedded models: ``python -m training`` rebuilds the shipped weights from nothing.

Part of the repository, not of the package: an installed s2q has the weights.
"""
