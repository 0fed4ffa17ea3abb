"""Commands for bulk operations: acts on many dead letters or executions, which the server performs by itself."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from typer import Argument, Option

from pilotflame.commands.arguments import AllOption, KeyOption, LimitOption, YesOption, confirm, read_object
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list, show_object, take
from pilotflame.commands.server_connection import connect

app = new_noun("Act on many dead letters or runs at a pace.")
COLUMNS = {
    "Operation": "id",
    "Action": "action",
    "Status": "status",
    "Done": "done",
    "Refused": "refused",
    "Total": "total",
    "Begun": "createdAt",
}
OperationArgument = Annotated[str, Argument(metavar="OPERATION", help="Id of a bulk operation.")]
PaceOption = Annotated[int | None, Option("--per-second", min=1, help="Objects per second at most.")]


class BulkAct(StrEnum):
    """Act of a bulk operation, with its objects."""

    REDRIVE_DEAD_LETTERS = "redrive-dead-letters"
    REPLAY_DEAD_LETTERS = "replay-dead-letters"
    PURGE_DEAD_LETTERS = "purge-dead-letters"
    CANCEL_RUNS = "cancel-runs"
    RETRY_RUNS = "retry-runs"
    REPLAY_RUNS = "replay-runs"


@app.command("begin")
def begin_operation(
    act: Annotated[BulkAct, Argument(help="Act, with its objects.")],
    count: Annotated[int, Option(min=1, help="Number of objects that you expect the filter to select.")],
    selection: Annotated[str, Option("--filter", help="Filter as JSON, @file or @-; {} selects all.")] = "{}",
    per_second: PaceOption = None,
    first_alone: Annotated[
        bool, Option("--first-alone", help="Go on only if the run of the oldest completes.")
    ] = False,
    node_ids: Annotated[
        list[str] | None, Option("--confirm", help="Write that a replay may repeat; may be given again.")
    ] = None,
    idempotency_key: KeyOption = None,
    yes: YesOption = False,
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Begin to act on the objects that a filter selects, the oldest first; the server goes on by itself."""
    verb, _, objects = act.partition("-")
    confirm(f"{verb.capitalize()} {count:,} {objects.replace('-', ' ')}?", is_confirmed=yes)
    fields: dict[str, Any] = {
        "action": verb,
        "filter": read_object(selection, "--filter"),
        "count": count,
        "per_second": per_second,
        "first_alone": first_alone or None,
        "confirm": node_ids,
    }
    client = connect().bulk_operations
    begin = client.begin_for_executions if objects == "runs" else client.begin_for_dead_letters
    show_object(dict(begin(**fields, idempotency_key=idempotency_key)), output)


@app.command("list")
def list_operations(
    is_open: Annotated[bool, Option("--open", help="Only those that have not ended.")] = False,
    limit: LimitOption = 20,
    every: AllOption = False,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List bulk operations with their progress, the newest first."""
    query = {"open": "true" if is_open else None}
    found = connect().iterate("/api/v1/bulk-operations", "operations", query, has_cursor=True)
    show_list(take(found, limit, all_items=every), output, COLUMNS)


@app.command("get")
def get_operation(operation: OperationArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Print a bulk operation with its progress."""
    show_object(dict(connect().bulk_operations.get(operation)), output)


@app.command("stop")
def stop_operation(operation: OperationArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Stop a bulk operation after its present step; the other objects stay as they are."""
    show_object(dict(connect().bulk_operations.stop(operation)), output)


@app.command("pace")
def set_pace(
    operation: OperationArgument,
    per_second: Annotated[int, Argument(min=1, metavar="NUMBER", help="Objects per second at most.")],
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Set the number of objects per second of a bulk operation."""
    show_object(dict(connect().bulk_operations.set_pace(operation, per_second=per_second)), output)
