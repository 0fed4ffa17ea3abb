"""Command `run`: execute a workflow and print its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from pilotflame import exit_codes, run_outputs
from pilotflame.commands.arguments import KeyOption, WorkflowArgument, read_object, read_pairs
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import is_terminal, remark, say
from pilotflame.commands.server_connection import connect
from pilotflame.run_outputs import OutputChoice

if TYPE_CHECKING:
    from pilotflame_sdk import Client, Run

app = new_noun("Execute a workflow and print its outputs.")
SHORT_RUN_SECONDS = 2
"""Time for which `run` waits for a result before it shows the id of the execution."""

InputOption = Annotated[
    str,
    Option(
        "--input",
        help="Trigger inputs as JSON, @file or @- for standard input; or a whole request body with `triggerInputs`.",
    ),
]
OutputChoiceOption = Annotated[
    OutputChoice,
    Option(
        "--output",
        "-o",
        help="Outputs to print: of the last nodes, of all nodes or of none,"
        " or a JSON object with executionId, status, outputs and error.",
    ),
]
TimeoutOption = Annotated[
    float | None, Option(min=0, help="Seconds after which the command exits with 6; the run goes on.")
]
TagOption = Annotated[list[str] | None, Option("--tag", help="Tag of the run; may be repeated.")]
StreamOption = Annotated[
    bool | None,
    Option(
        "--stream/--no-stream",
        help="Print texts of models and steps of agents on standard error while they come.",
        show_default="on a terminal",
    ),
]
MetadataOption = Annotated[
    list[str] | None, Option("--metadata", help="Metadata as key=value; may be repeated.")
]


@app.command("run")
def run_workflow(
    workflow: WorkflowArgument,
    given: InputOption = "{}",
    watch: Annotated[bool, Option("--watch", help="Show the progress of each node.")] = False,
    stream: StreamOption = None,
    timeout: TimeoutOption = None,
    tag: TagOption = None,
    metadata: MetadataOption = None,
    idempotency_key: KeyOption = None,
    output: OutputChoiceOption = OutputChoice.LAST,
) -> None:
    """Execute a workflow and print its outputs.

    Waits for its end, and exits with 5 unless it completed. Ctrl-C leaves the run alone.

    On a terminal, texts of models are printed while they come, and long outputs are truncated; files and pipes
    get all of them.
    """
    from pilotflame import live_text

    is_streamed = live_text.is_terminal() if stream is None else stream
    body = read_body(given)
    client = connect()
    workflow_id = client.workflows.find(workflow)
    connections = read_connections(client, workflow_id, body) if output is OutputChoice.LAST else []
    # Short, so that the id of a longer run is shown soon.
    run = client.start(
        workflow_id,
        wait=0 if watch or is_streamed else SHORT_RUN_SECONDS,
        idempotency_key=idempotency_key,
        **start_options(body, tag, metadata),
    )
    typer.echo(run.id, err=True)
    try:
        if watch:
            watch_nodes(workflow, run, is_streamed=is_streamed)
        with live_text.print_live_texts(run.stream_steps()) if is_streamed and not watch else nullcontext():
            run.wait(timeout)
    except KeyboardInterrupt:
        remark(f"{run.id} goes on: pilotflame runs watch {run.id}")
        raise
    print_outcome(run, output, connections)


def watch_nodes(name: str, run: Run, *, is_streamed: bool) -> None:
    """Show the nodes of a run until its end, with the texts of its models if they are streamed.

    Texts are part of the view on a terminal, else printed as lines: a view that moves would fill a file.
    """
    from pilotflame import live_text, live_view

    in_view = is_streamed and live_text.is_terminal()
    with live_text.print_live_texts(run.stream_steps()) if is_streamed and not in_view else nullcontext():
        live_view.show_run(name, run.stream(), run.stream_steps() if in_view else None)


def read_body(given: str) -> dict[str, Any]:
    """Return the body of an execute request; an object without `triggerInputs` becomes the trigger inputs.

    `given` is JSON, @file or @-. Raises `CommandError`.
    """
    inputs = read_object(given, "--input")
    return inputs if "triggerInputs" in inputs else {"triggerInputs": inputs}


def start_options(
    body: Mapping[str, Any], tags: Sequence[str] | None, metadata: Sequence[str] | None
) -> dict[str, Any]:
    """Return the arguments of a start of the SDK: the fields of a body, with tags and metadata of the command
    line added.

    Metadata are texts `key=value` and win over those of the body. Raises `CommandError`.
    """
    fields = dict(body)
    named = read_pairs(metadata, "--metadata")
    return {
        "inputs": fields.pop("triggerInputs"),
        "tags": [*(fields.pop("tags", None) or ()), *(tags or ())] or None,
        "metadata": {**(fields.pop("metadata", None) or {}), **named} or None,
        **fields,
    }


def print_outcome(run: Run, output: OutputChoice, connections: Sequence[Mapping[str, Any]] = ()) -> None:
    """Print the outputs of an ended run as `output` chooses, then exit with 5 unless the run has completed.

    Before the exit, a remark shows the run's error, or its status if there is none. `connections` of the graph
    tell which nodes are the last ones, for `OutputChoice.LAST`.
    """
    _print_outputs(run, output, connections)
    if run.status != "completed":
        from pilotflame_sdk import RunFailed

        remark(str(RunFailed(run.id, run.status, run.error)) if run.error else f"{run.id} {run.status}")
        raise typer.Exit(exit_codes.RUN_FAILED)


def read_connections(
    client: Client, workflow_id: str, body: Mapping[str, Any]
) -> Sequence[Mapping[str, Any]]:
    """Return the connections of the graph to run: of the body's own definition, else of the workflow.

    Empty after any `APIError`, such as for a key that may execute the workflow but not read it.
    """
    from pilotflame_sdk import APIError

    given = body.get("definition") or {}
    if isinstance(given, dict) and given.get("connections"):
        return list(given["connections"])
    try:
        return client.workflows.get(workflow_id)["connections"]
    except APIError:
        return []


def _print_outputs(run: Run, choice: OutputChoice, connections: Sequence[Mapping[str, Any]]) -> None:
    """Print the outputs of an ended run, and remarks about those that are too large or truncated."""
    outputs = run.outputs
    if choice is OutputChoice.NONE:
        return
    for node_id, note in run_outputs.find_omitted(outputs).items():
        remark(f"the output of {node_id} has {note['bytes']:,} bytes and is not shown: GET {note['url']}")
    if choice is OutputChoice.JSON:
        shown = {"executionId": run.id, "status": run.status, "outputs": outputs, "error": run.error}
        say(run_outputs.render(shown))
        return
    if choice is OutputChoice.LAST:
        outputs = run_outputs.select_last(outputs, connections)
    text = run_outputs.render(outputs)
    if choice is OutputChoice.LAST and is_terminal():
        text, is_cut = run_outputs.truncate(text)
        if is_cut:
            remark("long outputs are truncated on a terminal; --output all prints everything")
    say(text)
