"""Create a workflow, execute it, poll it until it ends, and read a refusal, with the client of
openapi-python-client.

Arguments: the URL of a server and an API key. A test generates `pilotflame_client` beside this file, and
mypy checks both.
"""

import sys
from http import HTTPStatus

from pilotflame_client import AuthenticatedClient
from pilotflame_client.api.execute import execute_start
from pilotflame_client.api.executions import executions_events, executions_progress, executions_show
from pilotflame_client.api.workflows import workflows_create, workflows_show
from pilotflame_client.models import (
    ConnectionInput,
    CreateWorkflow,
    ErrorResponse,
    ExecuteRequest,
    ExecuteRequestTriggerInputsType0,
    ExecuteResult,
    NewWorkflow,
    NodeInput,
    NodeInputConfigType0,
    Progress,
    Workflow,
    WorkflowStatus,
)

UNFINISHED = ("pending", "running", "waiting")


def main(url: str, key: str) -> None:
    """Use the generated client against a server: create, show and execute a workflow, and read a refusal."""
    client = AuthenticatedClient(
        base_url=url, token=key, prefix="", auth_header_name="X-API-Key", raise_on_unexpected_status=True
    )
    graph = CreateWorkflow(
        name="Greeting",
        status=WorkflowStatus.ACTIVE,
        nodes=[
            NodeInput(id="start", node_id="rest-api"),
            NodeInput(
                id="greet",
                node_id="template",
                config=NodeInputConfigType0.from_dict({"text": "Hello {{ data.body.name }}"}),
            ),
        ],
        connections=[ConnectionInput(source="start", target="greet")],
    )
    made = workflows_create.sync(client=client, body=graph)
    assert isinstance(made, NewWorkflow), made
    shown = workflows_show.sync(made.workflow_id, client=client)
    assert isinstance(shown, Workflow), shown
    assert [node.id for node in shown.nodes] == ["start", "greet"]

    inputs = ExecuteRequestTriggerInputsType0.from_dict({"name": "Ada"})
    started = execute_start.sync(made.workflow_id, client=client, body=ExecuteRequest(trigger_inputs=inputs))
    assert isinstance(started, ExecuteResult), started
    while True:
        progress = executions_progress.sync(started.execution_id, client=client, wait=20)
        assert isinstance(progress, Progress), progress
        if progress.status not in UNFINISHED:
            break
    assert progress.status == "completed", progress
    assert progress.outputs["greet"]["text"] == "Hello Ada", progress
    events = executions_events.sync(started.execution_id, client=client)
    assert isinstance(events, str), events
    assert "event: span" in events, events

    refused = executions_show.sync_detailed("exec_0", client=client)
    assert refused.status_code is HTTPStatus.NOT_FOUND, refused
    assert isinstance(refused.parsed, ErrorResponse), refused
    assert refused.parsed.error.code == "not-found", refused


main(*sys.argv[1:])
