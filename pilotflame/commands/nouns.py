"""Groups of commands that load the module of a command by its use, since most of a start is loading code."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from typer import Typer
from typer.core import TyperGroup
from typer.main import get_group

if TYPE_CHECKING:
    from typer._click.core import Command, Context


class CommandPlace(NamedTuple):
    """Place of a command: a module below `pilotflame.commands`, whose `app` is the group."""

    module: str
    command: str | None = None
    """Command of the group; None for the group itself."""


def new_noun(summary: str) -> Typer:
    """Return an empty group of commands with a summary for its help.

    It doesn't use rich, which Typer would load to render help and errors.
    """
    return Typer(rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True, help=summary)


class LazyGroup(TyperGroup):
    """Group whose commands are loaded by their name."""

    places: ClassVar[Mapping[str, CommandPlace]] = {}

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - as Typer has it
        super().__init__(**options)
        # Suggestions for misspelled commands compare with these names.
        self.commands = _LoadedCommands(self.places)


class _LoadedCommands(dict[str, Any]):
    """Commands by name; each is loaded when it is looked up."""

    def __init__(self, places: Mapping[str, CommandPlace]) -> None:
        super().__init__(dict.fromkeys(places))
        self._places = places

    def get(self, name: str, default: Any = None) -> Command | Any:  # noqa: ANN401 - as `dict` has it
        return self._load(name) if name in self else default

    def items(self) -> Any:  # noqa: ANN401 - as `dict` has it
        return [(name, self._load(name)) for name in self]

    def _load(self, name: str) -> Command:
        """Return a command, loading its module at the first use."""
        found: Command | None = super().get(name)
        if found is None:
            module, command = self._places[name]
            group = get_group(importlib.import_module(f"pilotflame.commands.{module}").app)
            found = group if command is None else group.commands[command]
            self[name] = found
        return found


def list_commands(group: TyperGroup, context: Context) -> list[tuple[str, Command]]:
    """Return the commands of a group that its help shows, each with its name; their modules are loaded."""
    found = ((name, group.get_command(context, name)) for name in group.list_commands(context))
    return [(name, command) for name, command in found if command is not None and not command.hidden]
