"""Commands for deployments: processes of workflows that scale to zero."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from pilotflame.commands.arguments import WorkflowArgument, read_object
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, say, show_list, show_object
from pilotflame.commands.server_connection import connect

app = new_noun("Deploy workflows, and control their processes.")
COLUMNS = {"Workflow": "id", "Name": "name", "Status": "status"}


@app.command("deploy")
def deploy(
    workflow: WorkflowArgument,
    version: Annotated[int | None, Option(help="Version to deploy.", show_default="current")] = None,
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Deploy a workflow."""
    client = connect()
    workflow_id = client.workflows.find(workflow)
    if version is None:
        answer = client.deployments.deploy(workflow_id)
    else:
        answer = client.deployments.deploy_version(workflow_id, version=version)
    show_object(dict(answer), output, key="workflowId")


@app.command("undeploy")
def undeploy(workflow: WorkflowArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Remove the deployment of a workflow."""
    client = connect()
    show_object(dict(client.deployments.undeploy(client.workflows.find(workflow))), output, key="workflowId")


@app.command("start")
def start(workflow: WorkflowArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Start the pods of a deployed workflow."""
    client = connect()
    show_object(dict(client.deployments.start(client.workflows.find(workflow))), output, key="workflowId")


@app.command("stop")
def stop(workflow: WorkflowArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Stop the pods of a deployed workflow, after their runs."""
    client = connect()
    show_object(dict(client.deployments.stop(client.workflows.find(workflow))), output, key="workflowId")


@app.command("status")
def show_status(workflow: WorkflowArgument, output: FormatOption = OutputFormat.TABLE) -> None:
    """Print the state of a deployment."""
    client = connect()
    show_object(dict(client.deployments.status(client.workflows.find(workflow))), output, key="workflowId")


@app.command("lifecycle")
def lifecycle(
    workflow: WorkflowArgument,
    policy: Annotated[
        str | None,
        Option("--set", help='New policy as JSON, @file or @-, such as \'{"type": "always-on"}\'.'),
    ] = None,
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Print the lifecycle policy of a deployment, or set it."""
    client = connect()
    workflow_id = client.workflows.find(workflow)
    if policy is not None:
        path = f"/api/v1/workflows/{workflow_id}/lifecycle"
        client.request("PUT", path, json=read_object(policy, "--set"))
    show_object(dict(client.deployments.lifecycle(workflow_id)), output, key="workflowId")


@app.command("keep-awake")
def keep_awake(
    workflow: WorkflowArgument,
    hours: Annotated[float, Option(min=1 / 60, max=168, help="Hours from now.")] = 1,
    ends: Annotated[bool, Option("--end", help="Keep it awake no longer.")] = False,
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Keep a deployment awake for a time, regardless of its lifecycle policy."""
    client = connect().deployments
    workflow_id = connect().workflows.find(workflow)
    if ends:
        client.end_hold(workflow_id)
        return
    held = client.keep_awake(workflow_id, expires_in_seconds=round(hours * 3_600))
    show_object(dict(held), output, key="workflowId")


@app.command("logs")
def logs(workflow: WorkflowArgument) -> None:
    """Print the output of the pods of a deployed workflow."""
    client = connect()
    for line in client.deployments.logs(client.workflows.find(workflow))["lines"]:
        say(" ".join(str(value) for value in line.values() if value is not None))


@app.command("discover")
def discover(
    app_id: Annotated[str | None, Option(help="`config.appId` of the workflows.")] = None,
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """List the deployed workflows of an application."""
    found = connect().request("GET", "/api/v1/workflows/discover", query={"appId": app_id})
    show_list(found, output, COLUMNS)


@app.command("trigger")
def trigger(
    workflow: WorkflowArgument,
    given: Annotated[str, Option("--input", help="Request body as JSON, @file or @-.")] = "{}",
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Run a deployed workflow."""
    client = connect()
    path = f"/api/v1/workflows/{client.workflows.find(workflow)}/trigger"
    answer = client.request("POST", path, json=read_object(given, "--input"), is_keyed=True)
    show_object(answer, output, key="execution_id")
