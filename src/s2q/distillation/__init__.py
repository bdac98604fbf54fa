"""Sparse token distillation: which tokens matter (from the teacher's attention), their loss, one block."""
