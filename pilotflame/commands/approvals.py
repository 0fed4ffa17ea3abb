"""Commands for questions of runs that wait for a person."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from pilotflame.commands.arguments import ExecutionArgument, KeyOption, read_json
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list, show_object
from pilotflame.commands.server_connection import connect

app = new_noun("Answer runs that wait for a person.")
COLUMNS = {
    "Execution": "executionId",
    "Node": "nodeId",
    "Workflow": "workflowName",
    "Title": "title",
    "Asked": "requestedAt",
    "Expires": "expiresAt",
}


@app.command("list")
def list_questions(
    execution: Annotated[
        str | None, Option(help="Questions of this execution, also those of others.", show_default="all")
    ] = None,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the questions that the key may answer, or all of one execution."""
    client = connect()
    if execution is None:
        show_list(client.approvals.list()["inputs"], output, COLUMNS, key="executionId")
        return
    found = client.executions.pending_inputs(execution)["inputs"]
    shown = [{**one, "executionId": execution} for one in found]
    show_list(
        shown, output, {name: COLUMNS[name] for name in COLUMNS if name != "Workflow"}, key="executionId"
    )


@app.command("answer")
def answer(
    execution: ExecutionArgument,
    node: Annotated[str, Argument(metavar="NODE", help="Node that asks.")],
    choice: Annotated[str | None, Option(help="Port of the choice.")] = None,
    data: Annotated[str | None, Option(help="Data of a form, as JSON, @file or @-.")] = None,
    iteration: Annotated[str | None, Option(help="Iteration of a loop, or a tool call.")] = None,
    arguments: Annotated[
        str | None,
        Option(help="Arguments to make a tool call with, as JSON, @file or @-.", show_default="as asked"),
    ] = None,
    idempotency_key: KeyOption = None,
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Answer a question; the first answer counts."""
    done = connect().approvals.answer(
        execution,
        node_id=node,
        choice=choice,
        iteration=iteration,
        data=None if data is None else read_json(data, "--data"),
        arguments=None if arguments is None else read_json(arguments, "--arguments"),
        idempotency_key=idempotency_key,
    )
    show_object(dict(done), output, key="executionId")
