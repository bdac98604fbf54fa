"""The rotations that may follow the channel scale."""

from collections.abc import Callable

from s2q.transforms.base import Transform, identity
from s2q.transforms.hadamard import hadamard
from s2q.transforms.kronecker import KroneckerTransform

ROTATIONS: dict[str, Callable[..., Transform]] = {
    "identity": identity,
    "hadamard": hadamard,
    "kronecker": KroneckerTransform.build,
}
"""Rotations by name; each is called as `rotation(in_features, seed=seed)`."""
