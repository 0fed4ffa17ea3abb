"""Commands for tasks of workers."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from pilotflame.commands.arguments import AllOption, LimitOption
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, remark, show_list, show_object, take
from pilotflame.commands.server_connection import connect

app = new_noun("Read, retry and cancel tasks of your own node types.")
COLUMNS = {
    "Task": "id",
    "Type": "type",
    "Version": "version",
    "State": "state",
    "Attempt": "attempt",
    "Losses": "losses",
    "Worker": "workerId",
    "Execution": "executionId",
    "Created": "createdAt",
}


@app.command("list")
def list_tasks(
    state: Annotated[
        str | None, Option(help="ready, leased, completed, failed, …", show_default="all")
    ] = None,
    execution: Annotated[str | None, Option(help="Id of an execution.", show_default="all")] = None,
    node_type: Annotated[str | None, Option("--type", help="Node type.", show_default="all")] = None,
    limit: LimitOption = 20,
    every: AllOption = False,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the newest tasks."""
    query = {"state": state, "executionId": execution, "type": node_type}
    found = connect().iterate("/api/v1/tasks", "tasks", query)
    show_list(take(found, limit, all_items=every), output, COLUMNS)


TaskArgument = Annotated[str, Argument(metavar="TASK", help="Id of the task.")]


@app.command("get")
def get_task(
    task: TaskArgument,
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Print a task with its progress, attempts and error."""
    show_object(dict(connect().tasks.get(task)), output)


@app.command("retry")
def retry_task(task: TaskArgument) -> None:
    """Begin the next attempt at once; it replaces one of a worker that hangs, which then does not count."""
    remark(f"{task} is {connect().tasks.retry(task)['state']}")


@app.command("cancel")
def cancel_task(task: TaskArgument) -> None:
    """Cancel a task: its node fails with task-cancelled, and its worker is told to stop."""
    remark(f"{task} is {connect().tasks.cancel(task)['state']}")
