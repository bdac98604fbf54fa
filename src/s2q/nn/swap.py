"""Replacing one module of a model by another."""

from torch import nn

from s2q.common.errors import InvalidInputError


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module `name` ("to_out.0"), in place, in the training mode of the replaced one."""
    try:
        old = root.get_submodule(name)
    except AttributeError as error:
        raise InvalidInputError(f"{type(root).__name__} has no module {name!r}: {error}") from error
    if old is root:
        raise InvalidInputError("replace_module: got an empty name; a module cannot replace the root itself")
    new.train(old.training)
    root.set_submodule(name, new)
