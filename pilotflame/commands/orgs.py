"""Commands for organizations."""

from __future__ import annotations

import asyncio

import typer

from pilotflame import local_settings
from pilotflame.commands.nouns import new_noun

app = new_noun("Manage organizations directly in the database.")


@app.callback()
def orgs() -> None:
    """Manage organizations directly in the database."""


@app.command("create")
def create_organization(name: str) -> None:
    """Create an organization and print its id."""
    from pilotflame import accounts

    typer.echo(asyncio.run(accounts.create_organization(local_settings.read_settings(), name)))
