"""Commands for executions: list, follow, end, resume and replay them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from pilotflame.command_error import CommandError, escape_text
from pilotflame.commands.arguments import (
    AllOption,
    ExecutionArgument,
    ExecutionsArgument,
    KeyOption,
    LimitOption,
    WorkflowArgument,
    YesOption,
    confirm,
    read_json,
    read_object,
    read_pairs,
)
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import (
    FormatOption,
    OutputFormat,
    remark,
    say,
    show_list,
    show_object,
    show_table,
    show_value,
    take,
)
from pilotflame.commands.run import (
    InputOption,
    MetadataOption,
    OutputChoiceOption,
    StreamOption,
    TagOption,
    TimeoutOption,
    print_outcome,
    read_body,
    read_connections,
    start_options,
    watch_nodes,
)
from pilotflame.commands.server_connection import connect
from pilotflame.run_outputs import OutputChoice

if TYPE_CHECKING:
    from pilotflame_sdk import Client

app = new_noun("List, follow, end and repeat runs.")
COLUMNS = {
    "Execution": "id",
    "Workflow": "workflowId",
    "Status": "status",
    "Trigger": "triggerType",
    "Created": "createdAt",
    "Seconds": "seconds",
    "Error": "cause",
}
SPANS = {
    "Node": "nodeId",
    "Type": "nodeType",
    "Kind": "kind",
    "Iteration": "iteration",
    "Attempt": "attempt",
    "Status": "status",
    "Milliseconds": "durationMs",
    "Error": "error.code",
}
SIGNALS = {
    "Number": "number",
    "Name": "name",
    "State": "state",
    "Node": "nodeId",
    "Iteration": "iteration",
    "Sent": "sentAt",
}
SIGNALS_OF_A_PAGE = 1_000
WorkflowFilter = Annotated[
    str | None, Option("--workflow", help="Id or exact name of a workflow.", show_default="all")
]
StatusFilter = Annotated[
    str | None, Option("--status", help="pending, running, waiting, failed, …", show_default="all")
]
TagFilter = Annotated[str | None, Option("--tag", help="Tag of the runs.", show_default="any")]
SinceFilter = Annotated[
    str | None, Option("--since", help="Earliest start, as 2026-02-01T00:00:00Z.", show_default="any")
]
UntilFilter = Annotated[
    str | None, Option("--until", help="Time before which they started.", show_default="any")
]


@app.command("list")
def list_runs(
    workflow: WorkflowFilter = None,
    status: StatusFilter = None,
    trigger: Annotated[str | None, Option(help="Kind of trigger.", show_default="any")] = None,
    tag: TagFilter = None,
    metadata: MetadataOption = None,
    since: SinceFilter = None,
    until: UntilFilter = None,
    limit: LimitOption = 20,
    every: AllOption = False,
    output: FormatOption = OutputFormat.TABLE,
    as_json: Annotated[bool, Option("--json", hidden=True)] = False,
) -> None:
    """List the newest executions."""
    client = connect()
    query = {
        "workflow_id": None if workflow is None else client.workflows.find(workflow),
        "status": status,
        "trigger_type": trigger,
        "tag": tag,
        "metadata": read_pairs(metadata, "--metadata"),
        "since": since,
        "until": until,
    }
    found = take(
        client.iterate("/api/v1/executions", "executions", query, has_cursor=True), limit, all_items=every
    )
    output = OutputFormat.JSON if as_json else output
    show_list(map_rows(found) if output is OutputFormat.TABLE else found, output, COLUMNS)


def map_rows(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return executions with their duration in seconds ("" while they run) and the code of the innermost error."""
    rows = []
    for one in found:
        error = one["error"] or {}
        seconds = "" if one["durationMs"] is None else f"{one['durationMs'] / 1000:.3f}"
        rows.append({**one, "seconds": seconds, "cause": (error.get("cause") or error).get("code")})
    return rows


@app.command("get")
def get_run(execution: ExecutionArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Print an execution with its trigger, outputs and error."""
    show_object(dict(connect().executions.get(execution)), output)


@app.command("start")
def start_run(
    workflow: WorkflowArgument,
    given: InputOption = "{}",
    tag: TagOption = None,
    metadata: MetadataOption = None,
    idempotency_key: KeyOption = None,
) -> None:
    """Start an execution and print its id, without waiting for its end."""
    run = connect().start(
        workflow, idempotency_key=idempotency_key, **start_options(read_body(given), tag, metadata)
    )
    typer.echo(run.id)


@app.command("watch")
def watch_run(
    execution: ExecutionArgument,
    output: OutputChoiceOption = OutputChoice.NONE,
    stream: StreamOption = None,
) -> None:
    """Show the nodes of an execution while they run, and on a terminal the texts of its models; exits with 5 unless it
    completes.
    """
    from pilotflame import live_text

    client = connect()
    run = client.attach(execution)
    watch_nodes(execution, run, is_streamed=live_text.is_terminal() if stream is None else stream)
    print_outcome(run.wait(), output, _read_connections_for(client, execution, output))


@app.command("wait")
def wait_for_run(
    execution: ExecutionArgument,
    timeout: TimeoutOption = None,
    output: OutputChoiceOption = OutputChoice.ALL,
) -> None:
    """Wait for the end of an execution and print its outputs; exits with 5 unless it completes."""
    client = connect()
    run = client.attach(execution).wait(timeout)
    print_outcome(run, output, _read_connections_for(client, execution, output))


def _read_connections_for(
    client: Client, execution: str, output: OutputChoice
) -> Sequence[Mapping[str, Any]]:
    """Return the connections of an execution's workflow if the last outputs are to be printed;
    else none, without a request.
    """
    if output is not OutputChoice.LAST:
        return []
    return read_connections(client, client.executions.get(execution)["workflowId"], {})


@app.command("cancel")
def cancel_runs(executions: ExecutionsArgument) -> None:
    """End executions at once, as cancelled; running nodes are interrupted."""
    client = connect()
    for one in executions:
        client.executions.cancel(one)


@app.command("stop")
def stop_runs(executions: ExecutionsArgument) -> None:
    """End executions after the nodes that run now, as stopped."""
    client = connect()
    for one in executions:
        client.executions.stop(one)


@app.command("signal")
def signal_run(
    execution: ExecutionArgument,
    name: Annotated[str, Argument(metavar="NAME", help="Name for which a node of the execution waits.")],
    payload: Annotated[
        str, Option("--payload", help="Any JSON value, @file, or @- for standard input.")
    ] = "null",
    wait: Annotated[
        int, Option("--wait", min=0, max=30, help="Seconds to wait for the reply of a node reply-to-signal.")
    ] = 0,
    idempotency_key: KeyOption = None,
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Send a signal to an execution: a node that waits for its name continues with the payload, now or later."""
    sent = connect().executions.signal(
        execution,
        name=name,
        payload=read_json(payload, "--payload"),
        wait=wait,
        idempotency_key=idempotency_key,
    )
    show_object(dict(sent), output, key="number")


@app.command("signals")
def list_signals(
    execution: ExecutionArgument,
    state: Annotated[
        Literal["unread", "delivered"] | None,
        Option("--state", help="unread or delivered.", show_default="all"),
    ] = None,
    limit: LimitOption = 100,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the signals of an execution in order, and the nodes that have received them."""
    client = connect()
    found: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None and len(found) < limit:
        page = client.executions.signals(
            execution, state=state, after=after, limit=min(limit - len(found), SIGNALS_OF_A_PAGE)
        )
        found += [dict(one) for one in page["signals"]]
        after = page["next"]
    show_list(found, output, SIGNALS, key="number")


@app.command("state")
def show_state(
    execution: ExecutionArgument,
    key: Annotated[
        str | None, Option("--key", help="Print only the value of this key.", show_default="all")
    ] = None,
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Print the values that the nodes of an execution have published, also after its end."""
    state = connect().executions.state(execution)
    if key is None:
        show_object(dict(state), output, key="executionId")
        return
    if key not in state["values"]:
        known = ", ".join(state["values"]) or "none"
        raise CommandError(f"{execution} has published no value {key}: its keys are {known}")
    show_value(state["values"][key], output)


@app.command("resume")
def resume_run(
    execution: ExecutionArgument,
    is_fresh: Annotated[
        bool, Option("--fresh", help="Let agents without a result begin new conversations.")
    ] = False,
    idempotency_key: KeyOption = None,
) -> None:
    """Continue a failed execution in a new one after its completed nodes, and print the id of the new one."""
    resumed = connect().executions.resume(execution, fresh=is_fresh, idempotency_key=idempotency_key)
    typer.echo(resumed["executionId"])


@app.command("replay")
def replay(
    execution: Annotated[str, Argument(metavar="EXECUTION", help="Id of an ended execution.")],
    from_nodes: Annotated[
        list[str] | None, Option("--from", help="Node that runs again in any case; may be repeated.")
    ] = None,
    current: Annotated[bool, Option("--current", help="Run the workflow as it is now.")] = False,
    given: Annotated[
        str | None,
        Option(
            "--input",
            help="Other inputs of the trigger as JSON, @file, or @- for standard input.",
            show_default="those of the execution",
        ),
    ] = None,
    confirmed: Annotated[
        list[str] | None, Option("--confirm", help="Write that may be repeated; may be repeated.")
    ] = None,
    left_out: Annotated[
        list[str] | None,
        Option(
            "--skip",
            help="Write that does not run: its recorded output is used again, or without one it is skipped with"
            " the nodes that only it leads to; may be repeated.",
        ),
    ] = None,
    failed_only: Annotated[
        bool, Option("--failed-only", help="Keep completed iterations of loops with changed bodies.")
    ] = False,
    refreshed: Annotated[
        list[str] | None,
        Option(
            "--refresh",
            help="`read`: nodes that read run again; `model`: agents ask their models where a request differs.",
        ),
    ] = None,
    again: Annotated[bool, Option("--again", help="Replay an execution that was taken up before.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan, and start nothing.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Replay an execution: print the plan, then start the new execution and print its id.

    Nothing starts while a write would be repeated that --confirm does not name.
    """
    client = connect()
    chosen: dict[str, Any] = {
        "from_": from_nodes or [],
        "definition": "current" if current else "original",
        "input": None if given is None else read_object(given, "--input"),
        "confirm": confirmed or [],
        "skip": left_out or [],
        "refresh": refreshed or [],
        "failed_only": failed_only,
    }
    plan: Mapping[str, Any] = client.executions.replay(execution, dry_run=True, **chosen)
    if as_json:
        show_value(plan)
    else:
        print_plan(plan)
    asked = [node["nodeId"] for node in plan["nodes"] if node["decision"] == "ask"]
    if asked and not dry_run:
        named = " ".join(f"--confirm {node_id}" for node_id in asked)
        raise CommandError(
            f"The replay would repeat writes. To allow that, add {named}; to leave a write out, --skip and its id"
        )
    if not dry_run:
        started: Mapping[str, Any] = client.executions.replay(
            execution, plan_hash=plan["planHash"], again=again, **chosen
        )
        typer.echo(started["executionId"], err=as_json)


def print_plan(plan: Mapping[str, Any]) -> None:
    """Print the plan of a replay: each node with its decision and the reasons."""
    rows = []
    for node in plan["nodes"]:
        decision = node["decision"] + (" (failed iterations)" if node["failedOnly"] else "")
        if answers := node.get("answers"):
            decision += f" (answers used again: {answers['count']})"
        reasons = "; ".join(_reason_text(reason) for reason in node["reasons"])
        rows.append([node["nodeId"], decision, node["effect"], reasons])
    show_table(rows, ["Node", "Decision", "Effect", "Reasons"])
    counts = ", ".join(f"{count} {decision}" for decision, count in plan["counts"].items() if count)
    say(f"{counts}; about {plan['predictedSeconds']:.1f} s; definition: {plan['definition']}")
    if plan["removed"]:
        say(f"removed: {', '.join(plan['removed'])}")


def _reason_text(reason: Mapping[str, Any]) -> str:
    paths = ", ".join(reason["paths"])
    return f"{reason['code']} ({paths})" if paths else str(reason["code"])


@app.command("why")
def explain(
    subject: Annotated[
        str | None,
        Argument(
            help="Id of an execution, or id or exact name of a workflow.",
            show_default="all runs of the organization",
        ),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print the answer of the API.")] = False,
) -> None:
    """Explain why an execution or a workflow does not move, or count unfinished runs by reason."""
    from pilotflame import explanations

    explained = explanations.fetch_explanation(connect(), subject)
    if as_json:
        show_value(explained)
        return
    for line in explanations.render_explanation(explained):
        say(line)


@app.command("logs")
def show_logs(
    execution: ExecutionArgument,
    follow: Annotated[
        bool, Option("--follow", "-f", help="Print new lines until the execution ends.")
    ] = False,
    level: Annotated[str | None, Option(help="Level of the lines.", show_default="all")] = None,
) -> None:
    """Print the log lines of the nodes of an execution."""
    for line in _log_lines(connect(), execution, level, follow=follow):
        node = line["nodeId"] or "-"
        typer.echo(escape_text(f"{line['createdAt']} {line['level']:<7} {node} {line['message']}"))


def _log_lines(
    client: Client, execution: str, level: str | None, *, follow: bool
) -> Iterator[Mapping[str, Any]]:
    """Yield the log lines of an execution, of one level or for None of all.

    With `follow`, wait for new ones until the execution ends.
    """
    if not follow:
        path = f"/api/v1/executions/{_quote_id(execution)}/logs"
        yield from client.iterate(path, "logs", {"level": level})
        return
    for event in client.executions.stream(execution):
        if event.name == "log" and (level is None or event.data["level"] == level):
            yield event.data


def _quote_id(execution: str) -> str:
    from pilotflame_sdk.request_coding import quote_segment

    return quote_segment(execution)


@app.command("spans")
def list_spans(
    execution: ExecutionArgument,
    node: Annotated[str | None, Option(help="Id of a node.", show_default="all")] = None,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the steps of an execution with their states, attempts and durations."""
    query = {"node_id": node}
    path = f"/api/v1/executions/{_quote_id(execution)}/spans"
    show_list(list(connect().iterate(path, "spans", query)), output, SPANS)


@app.command("bulk")
def act_on_many(
    action: Annotated[Literal["cancel", "retry", "replay", "delete"], Argument(help="Action on each.")],
    workflow: WorkflowFilter = None,
    status: StatusFilter = None,
    tag: TagFilter = None,
    metadata: MetadataOption = None,
    since: SinceFilter = None,
    until: UntilFilter = None,
    limit: Annotated[int, Option(min=1, max=1000, help="Most executions, the oldest first.")] = 1000,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the selection, and change nothing.")] = False,
    yes: YesOption = False,
) -> None:
    """Cancel, retry, replay or delete the executions of a filter, up to 1,000 at once, and print their ids."""
    client = connect()
    workflow_id = None if workflow is None else client.workflows.find(workflow)
    chosen = {
        "workflowId": workflow_id,
        "status": status.split(",") if status else None,
        "tag": tag,
        "metadata": read_pairs(metadata, "--metadata") or None,
        "since": since,
        "until": until,
    }
    given = {name: value for name, value in chosen.items() if value is not None}
    path = f"/api/v1/executions/bulk-{action}"
    found = client.request("POST", path, json={"filter": given, "dryRun": True, "limit": limit})
    if not dry_run and found["matched"]:
        confirm(f"{action} {min(limit, found['matched'])} executions?", is_confirmed=yes)
        found = client.request("POST", path, json={"filter": given, "limit": limit}, is_keyed=True)
    for one in found.get("executionIds", ()):
        say(str(one))
    remark(f"{found['matched']} executions match, {found.get('remaining', 0)} remain")
