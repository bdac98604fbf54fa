"""Channel scale and Kronecker product in front of a linear."""

from s2q.ops.kronecker.reference import factor_orders, scaled_kronecker

__all__ = ["factor_orders", "scaled_kronecker"]
