"""Model families, one file each, and where a model comes from. The only importer of diffusers' model internals."""

from s2q.models.families import FAMILIES, family_of
from s2q.models.family import (
    OUTSIDE,
    BlockLinear,
    Family,
    block_linears,
    block_names,
    linears_of_block,
    outer_linears,
    token_layout,
    token_patch,
)
from s2q.models.source import ModelSource, resolve_model

__all__ = [
    "FAMILIES",
    "OUTSIDE",
    "BlockLinear",
    "Family",
    "ModelSource",
    "block_linears",
    "block_names",
    "family_of",
    "linears_of_block",
    "outer_linears",
    "resolve_model",
    "token_layout",
    "token_patch",
]
