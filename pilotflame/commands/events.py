"""Commands for events."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from pilotflame.commands.arguments import AllOption, KeyOption, LimitOption, WorkflowArgument, read_object
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list, show_object, take
from pilotflame.commands.server_connection import connect

app = new_noun("Send and replay events.")
COLUMNS = {"Id": "id", "Type": "eventType", "Source": "source", "Created": "createdAt"}
TOKENS = {"Id": "id", "Name": "name", "Created": "createdAt", "Revoked": "revokedAt"}
EventArgument = Annotated[str, Argument(metavar="EVENT", help="Id of the event.")]


@app.command("send")
def send_event(
    event_type: Annotated[str, Argument(metavar="TYPE", help="Type of the event, such as order.paid.")],
    data: Annotated[str, Option(help="Data as JSON, @file or @- for standard input.")] = "{}",
    source: Annotated[str | None, Option(help="Source of the event.")] = None,
    idempotency_key: KeyOption = None,
    output: FormatOption = OutputFormat.NAME,
) -> None:
    """Send an event, and print its id."""
    fields = {"event_type": event_type, "event_data": read_object(data, "--data"), "source": source}
    answer = connect().request(
        "POST", "/api/v1/workflows/events", fields=fields, idempotency_key=idempotency_key, is_keyed=True
    )
    show_object(answer, output, key="event_id")


@app.command("list")
def list_events(
    event_type: Annotated[str | None, Option("--type", help="Type of the events.")] = None,
    source: Annotated[str | None, Option(help="Source of the events.")] = None,
    since: Annotated[str | None, Option(help="Earliest time, as 2026-02-01T00:00:00Z.")] = None,
    limit: LimitOption = 20,
    every: AllOption = False,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the newest events."""
    query = {"eventType": event_type, "source": source, "since": since}
    found = connect().iterate("/api/v1/events", "events", query, has_cursor=True)
    show_list(take(found, limit, all_items=every), output, COLUMNS)


@app.command("get")
def get_event(event: EventArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Print an event with its data and the runs that it started."""
    show_object(dict(connect().events.get(event)), output)


@app.command("replay")
def replay_event(
    event: EventArgument, workflow: WorkflowArgument, output: FormatOption = OutputFormat.JSON
) -> None:
    """Run a workflow again on an event."""
    client = connect()
    done = client.events.replay(event, workflow_id=client.workflows.find(workflow))
    show_object(dict(done), output, key="executionId")


@app.command("tokens")
def list_tokens(output: FormatOption = OutputFormat.TABLE) -> None:
    """List the tokens with which other systems send events."""
    show_list(list(connect().event_tokens.iterate()), output, TOKENS)


@app.command("create-token")
def create_token(name: Annotated[str, Argument(help="Name of the token.")]) -> None:
    """Create a token for a system that sends events, and print it; it can't be shown again."""
    typer.echo(connect().event_tokens.create(name=name)["token"])


@app.command("revoke-token")
def revoke_token(token: Annotated[str, Argument(metavar="TOKEN", help="Id of the token.")]) -> None:
    """Revoke a token."""
    connect().event_tokens.revoke(token)
