"""Table of the commands of `pilotflame`, from their definitions."""

from __future__ import annotations

from collections.abc import Iterator

from typer.core import TyperGroup
from typer.main import get_command

from pilotflame.cli import app
from pilotflame.commands.nouns import list_commands


def build_commands_table() -> str:
    """Return a table with a row for each command: its name, arguments and summary."""
    rows = [f"| `{usage}` | {summary} |" for usage, summary in list_usages()]
    return "\n".join(["| command | meaning |", "| --- | --- |", *rows])


def list_usages() -> Iterator[tuple[str, str]]:
    """Yield each command that help shows, with its arguments and its summary; groups are replaced by their commands."""
    root = get_command(app)
    assert isinstance(root, TyperGroup)  # noqa: S101 - the type of its class
    context = root.context_class(root, info_name="pilotflame")
    for name, command in list_commands(root, context):
        if not isinstance(command, TyperGroup):
            yield _usage(name, command), _summary(command)
            continue
        below = command.context_class(command, info_name=name, parent=context)
        for verb, found in list_commands(command, below):
            yield _usage(f"{name} {verb}", found), _summary(found)


def _usage(name: str, command: object) -> str:
    """Return a command with its arguments, optional ones in brackets."""
    arguments = [one for one in getattr(command, "params", ()) if one.param_type_name == "argument"]
    words = [_argument_text(one.metavar or one.name.upper(), is_required=one.required) for one in arguments]
    return " ".join([name, *words])


def _argument_text(name: str, *, is_required: bool) -> str:
    return name if is_required or name.startswith("[") else f"[{name}]"


def _summary(command: object) -> str:
    """Return the first paragraph of a command's help as one line, without its period."""
    text = str(getattr(command, "help", "") or "")
    return " ".join(text.partition("\n\n")[0].split()).removesuffix(".")
