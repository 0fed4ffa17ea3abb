"""Commands for the audit trail."""

from __future__ import annotations

from typing import Annotated, Literal

from typer import Option

from pilotflame.commands.arguments import AllOption, LimitOption
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list, take
from pilotflame.commands.server_connection import connect

app = new_noun("Read the audit trail.")
COLUMNS = {"At": "createdAt", "Action": "action", "Object": "objectId", "User": "userId", "Key": "keyId"}


@app.callback()
def audit() -> None:
    """Read the audit trail."""


@app.command("list")
def list_entries(
    object_id: Annotated[str | None, Option("--object", help="Id of a changed object.")] = None,
    action: Annotated[str | None, Option(help="Kind of change, such as workflow.updated.")] = None,
    kind: Annotated[
        Literal["change", "decision", "all"],
        Option(help="Changes of objects, decisions of the system, or both."),
    ] = "change",
    user: Annotated[str | None, Option(help="Id of a user, or `system`.")] = None,
    request: Annotated[str | None, Option(help="Id of the request that made the changes.")] = None,
    key: Annotated[str | None, Option(help="Id of the key that made the changes.")] = None,
    reason: Annotated[
        str | None, Option(help="Reason of a decision about a deployment, such as idle.")
    ] = None,
    since: Annotated[str | None, Option(help="Earliest time, as 2026-02-01T00:00:00Z.")] = None,
    until: Annotated[str | None, Option(help="Time before which the changes happened.")] = None,
    limit: LimitOption = 20,
    every: AllOption = False,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the newest changes with their authors, and decisions of the system."""
    query = {
        "kind": kind,
        "objectId": object_id,
        "action": action,
        "userId": user,
        "requestId": request,
        "keyId": key,
        "reason": reason,
        "since": since,
        "until": until,
    }
    found = connect().iterate("/api/v1/audit", "entries", query, has_cursor=True)
    show_list(take(found, limit, all_items=every), output, COLUMNS)
