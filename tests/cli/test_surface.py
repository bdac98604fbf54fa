"""The command line is stable: `surface.txt` is what was promised. Change it only together with docs and changelog."""

import inspect
import typing
from pathlib import Path

import typer

from s2q.cli.app import app

GOLDEN = Path(__file__).with_name("surface.txt")


def callbacks():
    yield "", app.registered_callback.callback
    for command in app.registered_commands:
        yield command.name or command.callback.__name__, command.callback


def parameters(callback):
    """Name, description (typer's), type and default of every parameter."""
    hints = typing.get_type_hints(callback, include_extras=True)
    for parameter in inspect.signature(callback).parameters.values():
        if hints[parameter.name] is typer.Context:
            continue
        plain, description = typing.get_args(hints[parameter.name])[:2]
        yield parameter.name, description, plain, parameter.default


def flags_of(description) -> list[str]:
    first = description.default  # where typer keeps the first name inside Annotated
    names = [first] if isinstance(first, str) else []
    return names + list(getattr(description, "param_decls", None) or ())


def kind_of(plain) -> str:
    if type(None) in typing.get_args(plain):
        plain = next(option for option in typing.get_args(plain) if option is not type(None))
    if typing.get_origin(plain) is list:
        return "TEXT, repeatable"
    if typing.get_origin(plain) is typing.Literal:
        return "|".join(typing.get_args(plain))
    return {bool: "flag", int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}[plain]


def surface() -> str:
    lines = []
    for name, callback in callbacks():
        lines.append(f"s2q {name}".strip())
        for parameter, description, plain, default in parameters(callback):
            flags = " ".join(flags_of(description)) or parameter.upper()
            needed = "required" if default is inspect.Parameter.empty else f"default {default}"
            lines.append(f"    {flags}: {kind_of(plain)}, {needed}")
    return "\n".join(lines) + "\n"


def test_commands_and_flags_are_those_that_were_promised():
    assert surface() == GOLDEN.read_text(encoding="utf-8")


def test_every_command_and_flag_is_explained_and_kebab_case():
    for _name, callback in callbacks():
        assert callback.__doc__
        for _parameter, description, _plain, _default in parameters(callback):
            assert description.help
            for flag in flags_of(description):
                assert flag == flag.lower()
                assert "_" not in flag
