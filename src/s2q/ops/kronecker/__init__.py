"""Channel scale and Kronecker product in front of a linear."""

from s2q.ops.kronecker.reference import scaled_kronecker

__all__ = ["scaled_kronecker"]
