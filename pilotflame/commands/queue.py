"""Commands for messages of queue triggers, and for their dead letters."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer import Argument, Option

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
    "Workflow": "workflowName",
    "Trigger": "triggerType",
    "Error": "error.code",
    "Created": "createdAt",
    "Failed": "failedAt",
}
GROUP_COLUMNS = {
    "Group": "id",
    "Workflow": "workflowName",
    "Node": "nodeId",
    "Error": "code",
    "Count": "count",
    "Last": "lastAt",
    "Message": "message",
}
AnyWorkflowArgument = Annotated[
    str | None,
    Argument(metavar="[WORKFLOW]", help="Id or exact name of a workflow. Default: all.", show_default=False),
]
GroupOption = Annotated[str | None, Option(help="Group of `dead-letter-groups`.", show_default="all")]
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
    workflow: AnyWorkflowArgument = None,
    group: GroupOption = None,
    limit: LimitOption = 20,
    every: AllOption = False,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the failed runs of inbound requests, of one workflow or of the organization."""
    client = connect()
    workflow_id = None if workflow is None else client.workflows.find(workflow)
    query = {"workflow_id": workflow_id, "group": group}
    found = client.iterate("/api/v1/dead-letters", "deadLetters", query, has_cursor=True)
    show_list(take(found, limit, all_items=every), output, COLUMNS, key="executionId")


@app.command("dead-letter-groups")
def list_groups(workflow: AnyWorkflowArgument = None, output: FormatOption = OutputFormat.TABLE) -> None:
    """Group dead letters by workflow, node and error, the newest failure first."""
    client = connect()
    workflow_id = None if workflow is None else client.workflows.find(workflow)
    show_list(client.queue.dead_letter_groups(workflow_id=workflow_id)["groups"], output, GROUP_COLUMNS)


@app.command("redrive")
def redrive(
    workflow: AnyWorkflowArgument = None,
    group: GroupOption = None,
    chosen: ChosenOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
) -> None:
    """Run the current workflows again on dead letters: those of a workflow, a group, or the organization."""
    selection = _select(workflow, group, chosen)
    if not (selection or dry_run):
        confirm("Redrive all dead letters of the organization?", is_confirmed=yes)
    show_object(dict(connect().queue.redrive_all_dead_letters(filter=selection, dry_run=dry_run)))


@app.command("purge")
def purge(
    workflow: AnyWorkflowArgument = None,
    group: GroupOption = None,
    chosen: ChosenOption = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
) -> None:
    """Take dead letters off the list for good: those of a workflow, a group, or the organization."""
    selection = _select(workflow, group, chosen)
    if not dry_run:
        subject = "Purged dead letters" if selection else "All dead letters of the organization, once purged,"
        confirm(f"{subject} can't be redriven. Purge them?", is_confirmed=yes)
    show_object(dict(connect().queue.purge_all_dead_letters(filter=selection, dry_run=dry_run)))


def _select(workflow: str | None, group: str | None, chosen: list[str] | None) -> dict[str, Any]:
    """Return the filter of dead letters for the API from the options; empty for all of the organization."""
    workflow_id = None if workflow is None else connect().workflows.find(workflow)
    selection = {"workflowId": workflow_id, "group": group, "executionIds": chosen}
    return {name: value for name, value in selection.items() if value}
