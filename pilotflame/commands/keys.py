"""Commands for API keys, through the API or directly in the database."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from typer import Option

from pilotflame import local_settings
from pilotflame.command_error import CommandError, escape_text
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list, take
from pilotflame.commands.server_connection import connect, is_configured

app = new_noun("Manage API keys, through the API, or with --org directly in the database.")
SHOWN_IDS = 20
COLUMNS = {
    "Id": "id",
    "Key": "prefix",
    "Name": "name",
    "Scopes": "scopes",
    "Expires": "expiresAt",
    "Used": "lastUsedAt",
    "Revoked": "revokedAt",
}
DatabaseOrganization = Annotated[
    str | None, Option("--org", help="Id or name of an organization: use the database directly.")
]


@app.command("create")
def create_key(
    user: Annotated[
        str | None,
        Option(help="Id or e-mail address of the owner: create the key directly in the database."),
    ] = None,
    org: DatabaseOrganization = None,
    name: Annotated[str, Option(help="Name of the key.")] = "command line",
    scope: Annotated[
        list[str] | None,
        Option(help="Scope of the key; repeat the option for several. Default: all but tasks:work."),
    ] = None,
    days: Annotated[int | None, Option(min=1, help="Days until the key expires. Default: never.")] = None,
    node_type: Annotated[
        list[str] | None,
        Option(help="Node type that a worker with the key may perform, or acme/*; may be repeated."),
    ] = None,
) -> None:
    """Create an API key and print it; it can't be shown again.

    The API creates a key of the caller, with scopes that the caller has.
    """
    lifetime = timedelta(days=days) if days else None
    if user is None:
        _require_api(org, "Name the owner of the key with --user")
        client = connect()
        expires = None if lifetime is None else (datetime.now(UTC) + lifetime).isoformat(timespec="seconds")
        fields = {"name": name, "scopes": scope or None, "expiresAt": expires, "nodeTypes": node_type or None}
        typer.echo(client.request("POST", "/api/v1/auth/keys", fields=fields, is_keyed=True)["key"])
        return
    if node_type:
        raise CommandError("--node-type needs the API: leave out --user")
    from models.access import ALL_KEY_SCOPES, KeyScope
    from pilotflame import accounts

    if unknown := sorted(set(scope or ()) - ALL_KEY_SCOPES):
        raise CommandError(
            f"There is no scope {', '.join(unknown)}: choose from {', '.join(sorted(ALL_KEY_SCOPES))}"
        )
    chosen = [KeyScope(one) for one in scope] if scope else ALL_KEY_SCOPES - {KeyScope.TASKS_WORK}
    settings = local_settings.read_settings()
    typer.echo(asyncio.run(accounts.create_key(settings, org, user, name, chosen, lifetime)))


@app.command("list")
def list_keys(org: DatabaseOrganization = None, output: FormatOption = OutputFormat.TABLE) -> None:
    """List API keys, without their secrets."""
    if org is None and is_configured():
        show_list(take(connect().keys.iterate(), 0, all_items=True), output, COLUMNS)
        return
    from pilotflame import accounts

    for key in asyncio.run(accounts.list_keys(local_settings.read_settings(), org)):
        state = (
            "revoked" if key.revoked_at else f"until {key.expires_at:%Y-%m-%d}" if key.expires_at else "valid"
        )
        used = f"used {key.last_used_at:%Y-%m-%d}" if key.last_used_at else "never used"
        typer.echo(
            escape_text(f"{key.id}  {key.prefix}…  {state}  {used}  {','.join(key.scopes)}  {key.name}")
        )


@app.command("revoke")
def revoke_key(key_id: str, org: DatabaseOrganization = None) -> None:
    """Revoke a key; it stops working within two seconds."""
    if org is None and is_configured():
        connect().keys.revoke(key_id)
        return
    from pilotflame import accounts

    asyncio.run(accounts.revoke_key(local_settings.read_settings(), org, key_id))


@app.command("rotate-secret")
def rotate_secret() -> None:
    """Encrypt all secrets with PILOTFLAME_SECRET_KEY that a key of PILOTFLAME_PREVIOUS_SECRET_KEYS encrypted before.

    Safe to repeat and to run beside the server; an interrupted run continues where it stopped.
    """
    from pilotflame import secret_rotation

    done = asyncio.run(secret_rotation.rotate_secret(local_settings.read_settings()))
    typer.echo(f"{done.encrypted} secrets encrypted anew")
    if done.waiting_keys:
        typer.echo(
            f"{done.waiting_keys} API keys still depend on an earlier secret until their next use. "
            "Keys that are not used before its removal stop working"
        )
    if done.unreadable:
        raise CommandError(
            f"{len(done.unreadable)} can't be decrypted with any configured secret, and are left unchanged: "
            f"{', '.join(done.unreadable[:SHOWN_IDS])}"
        )


def _require_api(org: str | None, text: str) -> None:
    if org is not None:
        raise CommandError(text)
