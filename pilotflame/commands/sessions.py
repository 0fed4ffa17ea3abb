"""Commands for the sessions of browsers."""

from __future__ import annotations

from typing import Annotated

from typer import Argument

from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list
from pilotflame.commands.server_connection import connect

app = new_noun("List and end sessions of browsers.")
COLUMNS = {"Id": "id", "User": "userId", "Created": "createdAt", "Seen": "lastSeenAt", "Browser": "userAgent"}


@app.command("list")
def list_sessions(output: FormatOption = OutputFormat.TABLE) -> None:
    """List the sessions of the caller's keys."""
    show_list(connect().sessions.list()["sessions"], output, COLUMNS)


@app.command("end")
def end_session(session: Annotated[str, Argument(metavar="SESSION", help="Id of the session.")]) -> None:
    """End a session; its browser has to sign in again."""
    connect().sessions.end(session)
