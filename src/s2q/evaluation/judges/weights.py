"""Weights of the models that judge: files the user has; nothing is downloaded."""

from pathlib import Path

import torch

from s2q.common.errors import InvalidInputError, first_line


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read tensors by name from a `.safetensors` file, or from one of `torch.save` that holds nothing but tensors."""
    if not path.is_file():
        raise InvalidInputError(f"{path}: no such weight file; s2q does not download weights, pass the path of a copy")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format fails in its own way, and torch.load in many
        raise InvalidInputError(f"{path}: cannot be read as weights: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InvalidInputError(f"{path}: expected a state dict, tensors by name; got {type(content).__name__}")
    return content
