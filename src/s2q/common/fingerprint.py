"""Fingerprints of what a result depends on."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from s2q.common.files import canonical_json


def fingerprint(content: Any, modules: Iterable[nn.Module] = ()) -> str:
    """Hash plain data, and the names, dtypes, shapes and values of the tensors of modules."""
    digest = hashlib.sha256(canonical_json(content).encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
