"""Commands for data sources. Secrets come from standard input or the environment, never from arguments."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from pilotflame import exit_codes
from pilotflame.command_error import CommandError
from pilotflame.commands.arguments import (
    AllOption,
    LimitOption,
    YesOption,
    confirm,
    read_object,
    read_pairs,
)
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import (
    FormatOption,
    OutputFormat,
    remark_warnings,
    show_list,
    show_object,
    take,
)
from pilotflame.commands.server_connection import connect

app = new_noun("Manage data sources: databases, mail servers, buckets and credentials.")
COLUMNS = {"Id": "id", "Name": "name", "Type": "type", "Secrets": "secretNames", "Updated": "updatedAt"}
SourceArgument = Annotated[str, Argument(metavar="DATASOURCE", help="Id or exact name of the data source.")]
SettingsOption = Annotated[str | None, Option("--settings", help="Settings as JSON or @file.")]
SecretOption = Annotated[
    list[str] | None,
    Option("--secret-env", help="Secret from a variable, as password=DB_PASSWORD; may be repeated."),
]
StdinOption = Annotated[
    bool, Option("--secrets-stdin", help="Read the secrets as a JSON object from standard input.")
]


@app.command("list")
def list_sources(
    kind: Annotated[str | None, Option("--type", help="Type of the data sources.")] = None,
    limit: LimitOption = 100,
    every: AllOption = False,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the data sources that the key may use."""
    found = connect().iterate("/api/v1/datasources", "dataSources", {"type": kind})
    show_list(take(found, limit, all_items=every), output, COLUMNS)


@app.command("get")
def get_source(source: SourceArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Print a data source without its secrets."""
    show_object(dict(connect().datasources.get(find_source(source))), output)


@app.command("create")
def create_source(
    name: Annotated[str, Argument(help="Name of the data source.")],
    kind: Annotated[str, Option("--type", help="Type, such as postgresql or http-bearer.")],
    settings: SettingsOption = None,
    secret_env: SecretOption = None,
    secrets_stdin: StdinOption = False,
) -> None:
    """Create a data source and print its id."""
    body = {
        "name": name,
        "type": kind,
        "settings": read_object(settings or "{}", "--settings"),
        "secrets": _read_secrets(secret_env, is_stdin=secrets_stdin),
    }
    created = connect().request("POST", "/api/v1/datasources", json=body, is_keyed=True)
    remark_warnings(created)
    typer.echo(created["dataSourceId"])


@app.command("update")
def update_source(
    source: SourceArgument,
    name: Annotated[str | None, Option(help="New name.")] = None,
    settings: SettingsOption = None,
    secret_env: SecretOption = None,
    secrets_stdin: StdinOption = False,
) -> None:
    """Change a data source; options that are not given change nothing."""
    secrets = _read_secrets(secret_env, is_stdin=secrets_stdin)
    changed = connect().datasources.update(
        find_source(source),
        name=name,
        settings=None if settings is None else read_object(settings, "--settings"),
        secrets=secrets or None,
    )
    remark_warnings(dict(changed))


@app.command("delete")
def delete_source(
    source: SourceArgument,
    force: Annotated[bool, Option("--force", help="Even if workflows name it.")] = False,
    yes: YesOption = False,
) -> None:
    """Delete a data source with its secrets."""
    confirm(f"Delete the data source {source} with its secrets?", is_confirmed=yes)
    connect().datasources.delete(find_source(source), force=force)


@app.command("test")
def connect_source(source: SourceArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Connect with a data source; exits with 1 unless it works."""
    result: dict[str, Any] = dict(connect().datasources.test(find_source(source)))
    show_object(result, output)
    if not result["ok"]:
        raise typer.Exit(exit_codes.REFUSED)


@app.command("share")
def share_source(
    source: SourceArgument, user: Annotated[str, Argument(metavar="USER", help="Id of the user.")]
) -> None:
    """Let another user use a data source."""
    connect().datasources.share(find_source(source), user_id=user)


@app.command("unshare")
def unshare_source(
    source: SourceArgument, user: Annotated[str, Argument(metavar="USER", help="Id of the user.")]
) -> None:
    """Stop sharing a data source with a user."""
    connect().datasources.unshare(find_source(source), user)


@app.command("guests")
def list_guests(source: SourceArgument, output: FormatOption = OutputFormat.TABLE) -> None:
    """List the users who may use a data source by a share."""
    found = connect().datasources.shares(find_source(source))["sharedWith"]
    show_list(found, output, {"User": "userId", "Since": "sharedAt"}, key="userId")


@app.command("visibility")
def set_visibility(
    source: SourceArgument,
    visibility: Annotated[
        Literal["public", "private"], Argument(metavar="VISIBILITY", help="public or private.")
    ],
) -> None:
    """Let everybody in the organization use a data source, or only its owner, admins and guests."""
    connect().datasources.set_visibility(find_source(source), is_public=visibility == "public")


def find_source(id_or_name: str) -> str:
    """Return the id of a data source: an id (`ds_…`) is returned unchecked,
    else the name, with or without `@`, is looked up.

    Raises `CommandError` unless exactly one has the name.
    """
    if id_or_name.startswith("ds_"):
        return id_or_name
    named = id_or_name.removeprefix("@")
    found = [str(one["id"]) for one in connect().datasources.iterate() if one["name"] == named]
    if len(found) != 1:
        count = "no data source" if not found else f"{len(found)} data sources"
        raise CommandError(f"There is {count} {named!r}", exit_codes.REFUSED)
    return found[0]


def _read_secrets(variables: list[str] | None, *, is_stdin: bool) -> dict[str, Any]:
    """Return the secrets that the options give, by name: from environment variables,
    and a JSON object on standard input.

    Variables win. Raises `CommandError`.
    """
    secrets = read_object("-", "--secrets-stdin") if is_stdin else {}
    for name, variable in read_pairs(variables, "--secret-env").items():
        if variable not in os.environ:
            raise CommandError(f"--secret-env {name}: the variable {variable} is not set")
        secrets[name] = os.environ[variable]
    return secrets
