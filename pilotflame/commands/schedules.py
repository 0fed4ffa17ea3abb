"""Commands for schedules."""

from __future__ import annotations

from pilotflame.commands.arguments import AllOption, LimitOption, WorkflowArgument
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list, show_object, take
from pilotflame.commands.server_connection import connect

app = new_noun("Read schedules.")
COLUMNS = {
    "Workflow": "workflowId",
    "Name": "workflowName",
    "Active": "isActive",
    "Next": "nextRuns.0.at",
    "Problem": "problem",
}


@app.command("list")
def list_schedules(
    limit: LimitOption = 100, every: AllOption = False, output: FormatOption = OutputFormat.TABLE
) -> None:
    """List the schedules of all workflows, the next run first."""
    found = take(connect().schedules.iterate(), limit, all_items=every)
    show_list(found, output, COLUMNS, key="workflowId")


@app.command("get")
def get_schedule(workflow: WorkflowArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Print the next and last runs of a workflow's schedule."""
    client = connect()
    found = client.schedules.get(client.workflows.find(workflow))
    show_object(dict(found), output, key="workflowId")
