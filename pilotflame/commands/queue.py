"""Commands for messages of queue triggers, and for their dead letters."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Option

from pilotflame.commands.arguments import (
    AllOption,
    KeyOption,
    LimitOption,
    WorkflowArgument,
    YesOption,
    confirm,
    read_json,
)
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list, show_object, take
from pilotflame.commands.server_connection import connect

app = new_noun("Send messages, and handle dead letters.")
COLUMNS = {
    "Execution": "executionId",
    "Trigger": "triggerType",
    "Error": "error.code",
    "Created": "createdAt",
    "Failed": "failedAt",
}
ChosenOption = Annotated[
    list[str] | None, Option("--execution", help="Execution of a dead letter; may be repeated. Default: all.")
]
DryRunOption = Annotated[bool, Option("--dry-run", help="Only count.")]


@app.command("send")
def send_message(
    workflow: WorkflowArgument,
    message: Annotated[str, Option(help="Message as JSON, @file or @- for standard input.")] = "{}",
    priority: Annotated[int | None, Option(min=-100, max=100, help="Higher ones run sooner.")] = None,
    delay: Annotated[float | None, Option(min=0, help="Seconds before the run starts.")] = None,
    deduplication_id: Annotated[
        str | None, Option(help="Messages with the same id run once in a day.")
    ] = None,
    idempotency_key: KeyOption = None,
) -> None:
    """Run a workflow on a message, through its queue trigger, and print the id of the execution."""
    client = connect()
    answer = client.queue.send(
        client.workflows.find(workflow),
        message=read_json(message, "--message"),
        priority=priority,
        delay_seconds=delay,
        deduplication_id=deduplication_id,
        idempotency_key=idempotency_key,
    )
    typer.echo(answer["executionId"])


@app.command("dead-letters")
def list_dead_letters(
    workflow: WorkflowArgument,
    limit: LimitOption = 20,
    every: AllOption = False,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the failed runs of inbound requests of a workflow."""
    client = connect()
    found = client.queue.iterate_dead_letters(client.workflows.find(workflow))
    show_list(take(found, limit, all_items=every), output, COLUMNS, key="executionId")


@app.command("redrive")
def redrive(workflow: WorkflowArgument, chosen: ChosenOption = None, dry_run: DryRunOption = False) -> None:
    """Run the current workflow again on its dead letters."""
    client = connect()
    workflow_id = client.workflows.find(workflow)
    done = client.queue.redrive_dead_letters(workflow_id, execution_ids=chosen, dry_run=dry_run)
    show_object(dict(done))


@app.command("purge")
def purge(
    workflow: WorkflowArgument,
    chosen: ChosenOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
) -> None:
    """Take dead letters off the list for good."""
    client = connect()
    workflow_id = client.workflows.find(workflow)
    if not dry_run:
        confirm("Purged dead letters can't be redriven. Purge them?", is_confirmed=yes)
    show_object(dict(client.queue.purge_dead_letters(workflow_id, execution_ids=chosen, dry_run=dry_run)))
