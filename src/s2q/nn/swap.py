"""Replacing one module of a model by another."""

from torch import nn

from s2q.common.errors import InvalidInputError


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module called `name`, in place; it gets the training mode of the replaced one.

    Args:
        name: Dotted name below root, as `named_modules` gives it; children of a ModuleList count ("to_out.0").

    Raises:
        InvalidInputError: If root has no such module.
    """
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
