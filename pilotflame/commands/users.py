"""Commands for users of the organization, through the API or directly in the database."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import typer
from typer import Option

from pilotflame import local_settings
from pilotflame.commands.arguments import AllOption, LimitOption
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list, take
from pilotflame.commands.server_connection import connect

app = new_noun("Manage users, through the API, or with --org directly in the database.")
COLUMNS = {"Id": "id", "E-mail": "email", "Name": "name", "Role": "role", "Created": "createdAt"}


@app.command("list")
def list_users(
    output: FormatOption = OutputFormat.TABLE, limit: LimitOption = 100, every: AllOption = False
) -> None:
    """List the users of the organization."""
    show_list(take(connect().users.iterate(), limit, all_items=every), output, COLUMNS)


@app.command("create")
def create_user(
    email: str,
    org: Annotated[
        str | None,
        Option("--org", help="Id or name of an organization: create the user directly in the database."),
    ] = None,
    role: Annotated[
        Literal["viewer", "member", "admin"],
        Option(help="Role; a viewer only reads, an admin manages the whole organization."),
    ] = "member",
    name: Annotated[str, Option(help="Name of the user.")] = "",
) -> None:
    """Create a user and print its id."""
    if org is None:
        typer.echo(connect().users.create(email=email, name=name or email, role=role)["id"])
        return
    from models.access import UserRole
    from pilotflame import accounts

    settings = local_settings.read_settings()
    typer.echo(asyncio.run(accounts.create_user(settings, org, email, name, UserRole(role))))
