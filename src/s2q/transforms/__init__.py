"""Invertible transforms of a linear's input, whose inverse goes into the weight.

    y = x Wᵀ = (x T) · (W T⁻ᵀ)ᵀ

Every transform has the form T = diag(v) · (A ⊗ B), so that one pair of operations (a product by a vector, a product by
two small matrices) runs all of them and three tensors store any of them (`Factors`). Linears that read the same input
share one transform object. Between the two halves a low-rank branch may take a few directions out (`low_rank`), of the
input or of the weight.
"""

from s2q.transforms.base import Transform
from s2q.transforms.column_scale import column_scale
from s2q.transforms.compose import Compose
from s2q.transforms.hadamard import orthogonal_matrix
from s2q.transforms.kronecker import KroneckerTransform, batch_factors
from s2q.transforms.low_rank import principal_directions, weight_directions
from s2q.transforms.options import ROTATIONS, SEARCH, Transforms
from s2q.transforms.salience import SALIENCES
from s2q.transforms.smooth_scale import SmoothScale, smooth_scale

__all__ = [
    "ROTATIONS",
    "SALIENCES",
    "SEARCH",
    "Compose",
    "KroneckerTransform",
    "SmoothScale",
    "Transform",
    "Transforms",
    "batch_factors",
    "column_scale",
    "orthogonal_matrix",
    "principal_directions",
    "smooth_scale",
    "weight_directions",
]
