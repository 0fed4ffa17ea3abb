"""Commands for the addresses and tokens of triggers."""

from __future__ import annotations

from pilotflame.commands.arguments import WorkflowArgument, YesOption, confirm
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_object
from pilotflame.commands.server_connection import connect

app = new_noun("Show addresses of triggers, and replace their tokens.")


@app.command("address")
def show_address(workflow: WorkflowArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Print the addresses under which senders reach a workflow."""
    client = connect()
    show_object(dict(client.triggers.address(client.workflows.find(workflow))), output)


@app.command("replace-token")
def replace_token(
    workflow: WorkflowArgument, yes: YesOption = False, output: FormatOption = OutputFormat.JSON
) -> None:
    """Create a new token for the addresses of a workflow; the old one ends."""
    confirm("Senders must use the new address. Replace the token?", is_confirmed=yes)
    client = connect()
    workflow_id = client.workflows.find(workflow)
    path = f"/api/v1/workflows/{workflow_id}/trigger-token"
    show_object(client.request("POST", path, json={}), output)


@app.command("revoke-token")
def revoke_token(workflow: WorkflowArgument, yes: YesOption = False) -> None:
    """Revoke the token of the addresses of a workflow."""
    confirm("No sender will reach the workflow. Revoke the token?", is_confirmed=yes)
    client = connect()
    client.triggers.revoke_token(client.workflows.find(workflow))
