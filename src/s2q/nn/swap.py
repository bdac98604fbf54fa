"""Replacing one module of a model by another."""

from torch import nn

from s2q.common.errors import InvalidInputError


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module `name` ("to_out.0"), in place, in the training mode of the replaced one."""
    parent_name, _, child = name.rpartition(".")
    try:
        parent = root.get_submodule(parent_name)
        old = parent.get_submodule(child)
    except AttributeError as error:
        raise InvalidInputError(f"{type(root).__name__} has no module {name!r}: {error}") from error
    if not child:
        raise InvalidInputError("replace_module: got an empty name; a module cannot replace the root itself")
    new.train(old.training)
    setattr(parent, child, new)
