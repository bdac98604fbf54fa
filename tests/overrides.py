"""Changes to a recipe out of a common list and a test's own; a key given twice is refused by the recipes."""


def overriding(base, changes):
    """Return `base` without the keys of `changes`, then `changes`."""
    keys = {change.partition("=")[0] for change in changes}
    return [change for change in base if change.partition("=")[0] not in keys] + list(changes)
