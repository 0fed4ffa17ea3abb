"""Commands for workflows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from pilotflame import exit_codes
from pilotflame.commands.arguments import (
    AllOption,
    KeyOption,
    LimitOption,
    WorkflowArgument,
    YesOption,
    confirm,
    read_pairs,
)
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import (
    FormatOption,
    OutputFormat,
    remark,
    show_list,
    show_object,
    take,
)
from pilotflame.commands.server_connection import connect
from pilotflame.commands.workflow_definitions import read_definition
from pilotflame.commands.workflow_files import apply, diff, export

app = new_noun("Create, change, version and share workflows.")
COLUMNS = {
    "Id": "id",
    "Name": "name",
    "Status": "status",
    "Version": "version",
    "Tags": "tags",
    "Updated": "updatedAt",
}
VERSIONS = {
    "Version": "version",
    "Tag": "versionTag",
    "Description": "description",
    "By": "createdBy",
    "Created": "createdAt",
}
for _name, _command in (("apply", apply), ("diff", diff), ("export", export)):
    app.command(_name)(_command)
UserArgument = Annotated[str, Argument(metavar="USER", help="Id of the user.")]


@app.command("list")
def list_workflows(
    search: Annotated[str | None, Option(help="Text in name or description.")] = None,
    status: Annotated[str | None, Option(help="draft, active, paused or archived.")] = None,
    tag: Annotated[str | None, Option(help="Tag of the workflows.")] = None,
    limit: LimitOption = 100,
    every: AllOption = False,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the workflows that the key may read."""
    query = {"search": search, "status": status, "tag": tag}
    found = take(connect().iterate("/api/v1/workflows", "workflows", query), limit, all_items=every)
    show_list(found, output, COLUMNS)


@app.command("get")
def get_workflow(workflow: WorkflowArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Print a workflow with its graph."""
    client = connect()
    show_object(dict(client.workflows.get(client.workflows.find(workflow))), output)


@app.command("stats")
def show_stats(output: FormatOption = OutputFormat.TABLE) -> None:
    """Count the workflows by status."""
    show_object(dict(connect().workflows.stats()), output)


@app.command("validate")
def validate(workflow: WorkflowArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Check a workflow; exits with 1 if it has errors."""
    client = connect()
    found: dict[str, Any] = dict(client.workflows.validate(client.workflows.find(workflow)))
    show_object(found, output)
    if found["errors"]:
        raise typer.Exit(exit_codes.REFUSED)


@app.command("import")
def import_workflow(
    file: Annotated[Path, Argument(help="Exported document of a workflow.")],
    reference: Annotated[
        list[str] | None,
        Option(help="Data source of this server for one of the document, as ds_old=ds_new; may be repeated."),
    ] = None,
    name: Annotated[str | None, Option(help="Name of the workflow.")] = None,
    idempotency_key: KeyOption = None,
) -> None:
    """Create a draft from an exported document, and print its id.

    Without a needed --reference nothing is created: the document's references are printed.
    """
    document = read_definition(file)
    client = connect()
    path = "/api/v1/workflows/import"
    given = {old: new or None for old, new in read_pairs(reference, "--reference").items()}
    preview = client.request("POST", path, json={"document": document}, is_keyed=True)
    missing = [one for one in preview["references"] if one["id"] not in given]
    if missing:
        show_list(missing, OutputFormat.TABLE, {"Kind": "kind", "Id": "id"})
        remark("name the replacements: " + " ".join(f"--reference {one['id']}=ID" for one in missing))
        raise typer.Exit(exit_codes.USAGE)
    fields = {"document": document, "references": given, "name": name}
    created = client.request("POST", path, fields=fields, idempotency_key=idempotency_key, is_keyed=True)
    typer.echo(created["workflowId"])


@app.command("status")
def set_status(
    workflow: WorkflowArgument,
    status: Annotated[str, Argument(metavar="STATUS", help="draft, active, paused or archived.")],
) -> None:
    """Set the status of a workflow."""
    client = connect()
    path = f"/api/v1/workflows/{client.workflows.find(workflow)}/status"
    client.request("PUT", path, json={"status": status})


@app.command("versions")
def list_versions(workflow: WorkflowArgument, output: FormatOption = OutputFormat.TABLE) -> None:
    """List the versions of a workflow, the oldest first."""
    client = connect()
    workflow_id = client.workflows.find(workflow)
    found: list[Any] = []
    while page := client.workflows.versions(workflow_id, offset=len(found))["versions"]:
        found += page
    show_list(found, output, VERSIONS, key="version")


@app.command("create-version")
def create_version(
    workflow: WorkflowArgument,
    tag: Annotated[str, Argument(metavar="TAG", help="Tag of the version, such as v1.1.0.")],
    description: Annotated[str | None, Option(help="Description of the version.")] = None,
) -> None:
    """Store the workflow as it is now as a version, and print its number."""
    client = connect()
    path = f"/api/v1/workflows/{client.workflows.find(workflow)}/versions"
    fields = {"versionTag": tag, "description": description}
    typer.echo(client.request("POST", path, fields=fields)["version"])


@app.command("restore")
def restore(
    workflow: WorkflowArgument,
    version: Annotated[str, Argument(metavar="VERSION", help="Number of the version.")],
) -> None:
    """Restore the graph, settings, name and description of a version."""
    client = connect()
    client.workflows.restore(client.workflows.find(workflow), version)


@app.command("duplicate")
def duplicate(workflow: WorkflowArgument) -> None:
    """Copy a workflow into a draft, and print the id of the copy."""
    client = connect()
    typer.echo(client.workflows.duplicate(client.workflows.find(workflow))["workflowId"])


@app.command("templates")
def list_templates(output: FormatOption = OutputFormat.TABLE) -> None:
    """List the templates of the organization and of the server."""
    columns = {"Id": "id", "Name": "name", "Tags": "tags"}
    show_list(list(connect().workflows.iterate_templates()), output, columns)


@app.command("from-template")
def use_template(
    template: Annotated[str, Argument(metavar="TEMPLATE", help="Id of the template.")],
    name: Annotated[str | None, Option(help="Name of the workflow.")] = None,
    idempotency_key: KeyOption = None,
) -> None:
    """Create a draft from a template, and print its id."""
    made = connect().workflows.from_template(template_id=template, name=name, idempotency_key=idempotency_key)
    typer.echo(made["workflowId"])


@app.command("delete")
def delete(
    workflow: WorkflowArgument,
    force: Annotated[
        bool, Option("--force", help="Undeploy it, and cancel its runs, instead of refusing.")
    ] = False,
    yes: YesOption = False,
) -> None:
    """Delete a workflow; its executions are kept."""
    client = connect()
    workflow_id = client.workflows.find(workflow)
    confirm(f"Delete the workflow {workflow}?", is_confirmed=yes)
    client.workflows.delete(workflow_id, force=force or None)


@app.command("log-level")
def log_level(
    workflow: WorkflowArgument,
    level: Annotated[
        str | None,
        Argument(help="debug, info, warning or error; off ends the present level.", show_default="show it"),
    ] = None,
    minutes: Annotated[int, Option(min=1, max=1_440, help="Time for which it holds.")] = 60,
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Show the lowest level of the lines that runs log, or set it for an hour or --minutes; debug adds lines about each
    node.
    """
    client = connect()
    workflow_id = client.workflows.find(workflow)
    path = f"/api/v1/workflows/{workflow_id}/log-level"
    if level is None:
        answer = client.request("GET", path)
    elif level == "off":
        answer = client.request("PUT", path, json={"level": None})
    else:
        until = datetime.now(UTC) + timedelta(minutes=minutes)
        answer = client.request("PUT", path, json={"level": level, "until": until.isoformat()})
    show_object(answer, output, key="level")


@app.command("share")
def share(workflow: WorkflowArgument, user: UserArgument) -> None:
    """Let another user read and execute a workflow."""
    client = connect()
    client.workflows.share(client.workflows.find(workflow), user_id=user)


@app.command("unshare")
def unshare(workflow: WorkflowArgument, user: UserArgument) -> None:
    """Stop sharing a workflow with a user."""
    client = connect()
    client.workflows.unshare(client.workflows.find(workflow), user)
