"""Groups of commands that load a command and its module by its use, since most of a start is loading code."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from typer import Typer
from typer.core import TyperGroup
from typer.main import get_command_from_info, get_command_name, get_group

if TYPE_CHECKING:
    from typer._click.core import Command, Context
    from typer.models import CommandInfo


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
        self.commands = _LoadedCommands(
            {name: partial(_load_command, place) for name, place in self.places.items()}
        )


class _LoadedCommands(dict[str, Any]):
    """Commands by name; each is made when it is looked up."""

    def __init__(self, makers: Mapping[str, Callable[[], Command]]) -> None:
        super().__init__(dict.fromkeys(makers))
        self._makers = makers

    def __getitem__(self, name: str) -> Command:
        found: Command | None = super().__getitem__(name)
        if found is None:
            found = self[name] = self._makers[name]()
        return found

    def get(self, name: str, default: Any = None) -> Command | Any:  # noqa: ANN401 - as `dict` has it
        return self[name] if name in self else default  # noqa: SIM401 - `get` is this method

    def items(self) -> Any:  # noqa: ANN401 - as `dict` has it
        return [(name, self[name]) for name in self]


def load_group(app: Typer) -> TyperGroup:
    """Return the group of a noun, whose commands are made when they are looked up: reading the signature of one takes
    half a millisecond.
    """
    without_commands = copy(app)
    without_commands.registered_commands = []
    group = get_group(without_commands)
    group.commands = _LoadedCommands(
        {
            one.name or get_command_name(one.callback.__name__): partial(_make_command, app, one)
            for one in app.registered_commands
            if one.callback is not None
        }
    )
    return group


def _make_command(app: Typer, info: CommandInfo) -> Command:
    return get_command_from_info(
        info,
        pretty_exceptions_short=app.pretty_exceptions_short,
        rich_markup_mode=app.rich_markup_mode,
    )


def _load_command(place: CommandPlace) -> Command:
    """Return a command from its module, which is loaded if it is not."""
    group = load_group(importlib.import_module(f"pilotflame.commands.{place.module}").app)
    return group if place.command is None else group.commands[place.command]


def list_commands(group: TyperGroup, context: Context) -> list[tuple[str, Command]]:
    """Return the commands of a group that its help shows, each with its name; their modules are loaded."""
    found = ((name, group.get_command(context, name)) for name in group.list_commands(context))
    return [(name, command) for name, command in found if command is not None and not command.hidden]
