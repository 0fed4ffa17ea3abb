"""Command `pilotflame`: processes of the server, and commands for users and operators.

Each command imports its own modules, so that its start doesn't load those of others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final

import typer
from typer import Option, Typer

from pilotflame import command_error, server_processes, unknown_variables
from pilotflame.command_error import escape_text
from pilotflame.commands import server_connection
from pilotflame.commands.nouns import CommandPlace, LazyGroup

COMPLETION: Final = "_PILOTFLAME_COMPLETE"
"""Variable by which the script of `pilotflame completion` asks for words."""
PROCESSES: Final = frozenset({"dev", "server", "bridge", *server_processes.PROCESSES})
NOUNS: Final = (
    "workflows",
    "runs",
    "bulk",
    "approvals",
    "nodes",
    "tasks",
    "workers",
    "datasources",
    "models",
    "tool-servers",
    "deployments",
    "events",
    "queue",
    "deliveries",
    "schedules",
    "triggers",
    "keys",
    "users",
    "invitations",
    "signing-secret",
    "orgs",
    "sessions",
    "audit",
)
PLACES: Final[Mapping[str, CommandPlace]] = {
    **{name: CommandPlace("processes", name) for name in ("dev", "server", *server_processes.PROCESSES)},
    "bridge": CommandPlace("bridge"),
    "smtp": CommandPlace("processes", "smtp"),
    "migrate": CommandPlace("operation", "migrate"),
    "doctor": CommandPlace("operation", "doctor"),
    "login": CommandPlace("profiles", "login"),
    "profile": CommandPlace("profiles"),
    "whoami": CommandPlace("profiles", "whoami"),
    "run": CommandPlace("run", "run"),
    "pull": CommandPlace("pull", "pull"),
    **{name: CommandPlace(name.replace("-", "_")) for name in NOUNS},
    "apply": CommandPlace("workflows", "apply"),
    "diff": CommandPlace("workflows", "diff"),
    "export": CommandPlace("workflows", "export"),
    "logs": CommandPlace("runs", "logs"),
    "why": CommandPlace("runs", "why"),
    "replay": CommandPlace("runs", "replay"),
    "api": CommandPlace("api", "api"),
    "completion": CommandPlace("api", "completion"),
}
"""Every command; some are short forms of commands of a noun."""


class PilotflameGroup(LazyGroup):
    """Group of all commands of `pilotflame`."""

    places: ClassVar[Mapping[str, CommandPlace]] = PLACES


class CommandGroup(Typer):
    """Command group that prints errors of users in one line; internal errors keep their traceback."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as Typer has it
        if COMPLETION in os.environ:
            # Typer prepares this itself only together with options that install a script.
            from typer._completion_classes import completion_init

            completion_init()
        with command_error.print_user_errors():
            return super().__call__(*args, **kwargs)


# Disabled, since Typer would load rich to render help and errors.
app = CommandGroup(
    cls=PilotflameGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)


def _show_version(is_wanted: bool) -> None:
    """Print the version of the program and end the command; do nothing unless it is wanted."""
    if is_wanted:
        from importlib import metadata

        typer.echo(f"pilotflame {metadata.version('pilotflame')}")
        raise typer.Exit


@app.callback()
def pilotflame(
    context: typer.Context,
    profile: Annotated[
        str | None, Option(help="Profile of `pilotflame login` to use, before all variables.")
    ] = None,
    version: Annotated[  # noqa: ARG001 - its callback has printed it
        bool, Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Self-hosted server for durable workflows.

    The server reads its settings from variables that begin with PILOTFLAME_. Commands that talk to a running server
    find it by PILOTFLAME_URL (default: http://127.0.0.1:8000) and PILOTFLAME_API_KEY, or by a profile of `login`.

    Exit codes: 0 done; 1 refused; 2 wrong usage; 4 login or scope; 5 the run failed; 6 timed out; 7 differences;
    130 interrupted.
    """
    server_processes.prepare_process()
    if profile is not None:
        server_connection.chosen_profiles.append(profile)
    if context.invoked_subcommand not in PROCESSES:  # Processes log this warning.
        for name, meant in unknown_variables.find_unknown(os.environ).items():
            typer.echo(
                escape_text(f"pilotflame: {unknown_variables.warning_text(name, meant)}"),
                err=True,
            )
