"""Commands for profiles: stored addresses and keys of servers."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated

import typer
from typer import Argument, Option

from pilotflame import exit_codes
from pilotflame.command_error import CommandError
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, remark, show_list, show_object
from pilotflame.commands.server_connection import connect

app = new_noun("Store addresses and keys of servers, and choose one.")
ProfileArgument = Annotated[str, Argument(metavar="PROFILE", help="Name of the profile.")]


@app.command("login")
def login(
    url: Annotated[str, Option(help="Address of the server.")] = "http://127.0.0.1:8000",
    name: Annotated[str, Option("--name", help="Name of the profile.")] = "default",
) -> None:
    """Check an API key, store it with its server in a profile that only you can read, and choose that profile.
    The key is asked for, or read from standard input: an argument would be visible to other users.
    """
    from pilotflame_sdk import Client, RetryPolicy
    from pilotflame_sdk.profiles import Profiles, ServerAddress, read_profiles, write_profiles

    key = typer.prompt("API key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read()
    with Client(url, key.strip(), retry=RetryPolicy(waits_for_start=False)) as client:
        caller = client.server.whoami()
        address = client.address
    stored = read_profiles()
    servers = {**stored.servers, name: ServerAddress(address.url, address.api_key)}
    path = write_profiles(Profiles(name, servers))
    remark(f"{caller['role']} of {caller['organizationId']} at {address.url}; stored in {path} as {name}")


@app.command("list")
def list_profiles(output: FormatOption = OutputFormat.TABLE) -> None:
    """List the profiles, without their keys."""
    from pilotflame_sdk.profiles import read_profiles

    stored = read_profiles()
    rows = [
        {"name": name, "url": one.url, "current": name == stored.current}
        for name, one in stored.servers.items()
    ]
    show_list(rows, output, {"Name": "name", "Url": "url", "Current": "current"}, key="name")


@app.command("use")
def use_profile(name: ProfileArgument) -> None:
    """Choose the profile of later commands."""
    from pilotflame_sdk.profiles import read_profiles, write_profiles

    stored = read_profiles()
    if name not in stored.servers:
        raise CommandError(f"There is no profile {name!r}: `pilotflame login --name {name}` stores one")
    write_profiles(replace(stored, current=name))


@app.command("remove")
def remove_profile(name: ProfileArgument) -> None:
    """Remove a profile; its key stays valid."""
    from pilotflame_sdk.profiles import Profiles, read_profiles, write_profiles

    stored = read_profiles()
    if name not in stored.servers:
        raise CommandError(f"There is no profile {name!r}", exit_codes.REFUSED)
    left = {other: one for other, one in stored.servers.items() if other != name}
    write_profiles(Profiles(None if stored.current == name else stored.current, left))


@app.command("whoami")
def whoami(output: FormatOption = OutputFormat.TABLE) -> None:
    """Print the user, organization, role and scopes of the key."""
    show_object(dict(connect().server.whoami()), output, key="userId")
