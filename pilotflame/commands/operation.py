"""Commands of operators: migrations and the search for drift."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from typer import Option

from pilotflame import local_settings
from pilotflame.command_error import CommandError, escape_text
from pilotflame.commands.nouns import new_noun

app = new_noun("Operate an installation.")


@app.command()
def migrate() -> None:
    """Migrate the database to the current schema; safe to repeat."""
    from models import schema_migration
    from models.database import parse_url
    from models.settings import ServerSettings

    asyncio.run(schema_migration.migrate(parse_url(ServerSettings().database_url)))
    typer.echo("The database is up to date")


@app.command()
def doctor(
    fix: Annotated[
        list[str] | None,
        Option("--fix", metavar="CLASS", help="Fix findings of this class; may be given several times."),
    ] = None,
    cluster: Annotated[
        bool, Option("--cluster", help="Examine the cluster too, with the settings of the deployer.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Examine the database, Redis, blobs, the cluster and settings for drift, and fix it on request.

    Everything is observed twice. Without --fix nothing is changed.

    Exits with 0 if nothing was found, 1 for findings, and 2 if a store could not be examined.
    """
    from doctor.findings import FIXES, DriftClass
    from pilotflame import doctor_command

    fixable = sorted(drift_class.value for drift_class in FIXES)
    if unknown := [name for name in fix or [] if name not in fixable]:
        raise CommandError(
            f"There is no fix for {', '.join(unknown)}; the classes with one are: {', '.join(fixable)}"
        )
    request = doctor_command.DoctorRequest(
        [DriftClass(name) for name in fix or []], looks_into_cluster=cluster
    )
    result = asyncio.run(doctor_command.examine_installation(local_settings.read_settings(), request))
    if as_json:
        typer.echo(doctor_command.encode_result(result).decode())
    else:
        typer.echo(escape_text("\n".join(doctor_command.describe_result(result))))
    raise typer.Exit(result.exit_code)
