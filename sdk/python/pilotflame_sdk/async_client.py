"""Asynchronous client of a Pilotflame server."""

from __future__ import annotations

import time
import warnings
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pilotflame_sdk import async_resources, run_states, workflow_files
from pilotflame_sdk.async_runs import AsyncRun
from pilotflame_sdk.errors import Conflict, NotFound
from pilotflame_sdk.request_coding import PREFER_SECONDS, quote_segment
from pilotflame_sdk.workflow_files import WorkflowWarning

if TYPE_CHECKING:
    from pilotflame_sdk.server_events import RunEvent
    from pilotflame_sdk.types import ApplyResult
    from pilotflame_sdk.workflow_files import HasDefinition


class AsyncExecutions(async_resources.AsyncExecutions):
    """Methods of `client.executions`."""

    def stream(self, execution_id: str) -> AsyncIterator[RunEvent]:
        """Yield the events of an execution from its beginning to its end; lost connections are resumed
        without loss.
        """
        return self._client.stream(f"/api/v1/executions/{self._quote(execution_id)}/events")

    def stream_steps(self, execution_id: str) -> AsyncIterator[RunEvent]:
        """Yield the events of an execution's agents and language models, as `Run.stream_steps` does."""
        return self._client.stream(f"/api/v1/executions/{self._quote(execution_id)}/steps")


class AsyncWorkflows(async_resources.AsyncWorkflows):
    """Methods of `client.workflows`."""

    async def find(self, id_or_name: str) -> str:
        """Return the id of a workflow that is given by its id or its exact name.

        An id (`wf_…`) is returned without asking the server. Raises `NotFound`, and `Conflict` if several
        workflows have the name.
        """
        if id_or_name.startswith("wf_"):
            return id_or_name
        found = [str(one["id"]) async for one in self.iterate(search=id_or_name) if one["name"] == id_or_name]
        if not found:
            raise NotFound("not-found", f"There is no workflow {id_or_name!r}", status=404)
        if len(found) > 1:
            message = f"{len(found)} workflows have the name {id_or_name!r}: {', '.join(found)}"
            raise Conflict("ambiguous-name", message, status=409)
        return found[0]

    async def apply(
        self,
        *workflows: Mapping[str, Any] | HasDefinition,
        set: str | None = None,  # noqa: A002 - the name of the API
        prune: Literal["archive", "delete"] | None = None,
        dry_run: bool = False,
        force: bool = False,
        strict: bool = False,
    ) -> ApplyResult:
        """Make workflows equal to these definitions, all or none, and return the changes.

        Names identify them. A workflow that was changed elsewhere is a `Conflict`, except with `force`. `prune`
        archives or deletes the other members of the set. Each warning of the validation is a `WorkflowWarning`;
        with `strict`, warnings are `ValidationFailed`, and nothing is applied.
        """
        result = await self.apply_all(
            workflows=[workflow_files.definition_of(workflow) for workflow in workflows],
            set=set,
            prune=prune,
            dry_run=dry_run,
            force=force,
            strict=strict or None,
        )
        for text in workflow_files.warning_texts(result):
            warnings.warn(text, WorkflowWarning, stacklevel=2)
        return result

    async def put(self, workflow: Mapping[str, Any] | HasDefinition) -> str:
        """Create or update the workflow with the name in the definition, and return its id.

        A status in the definition is set too. Raises `Conflict` if several workflows have the name.
        """
        definition = workflow_files.definition_of(workflow)
        try:
            workflow_id = await self.find(definition["name"])
        except NotFound:
            created = await self._client.request("POST", "/api/v1/workflows", json=definition, is_keyed=True)
            return str(created["workflowId"])
        changes = {name: value for name, value in definition.items() if name != "status"}
        await self._client.request("PUT", f"/api/v1/workflows/{self._quote(workflow_id)}", json=changes)
        if "status" in definition:
            await self.set_status(workflow_id, status=definition["status"])
        return workflow_id


class AsyncClient(async_resources.AsyncResourceClient):
    """Client of one server. Every method raises `APIError` and `TransportError`.

    Without arguments it uses PILOTFLAME_URL and PILOTFLAME_API_KEY, or the profile of `pilotflame login`. The tasks of
    one event loop may share a client.
    """

    @cached_property
    def executions(self) -> AsyncExecutions:
        """Executions."""
        return AsyncExecutions(self)

    @cached_property
    def workflows(self) -> AsyncWorkflows:
        """Workflows."""
        return AsyncWorkflows(self)

    async def start(
        self,
        workflow: str,
        inputs: Mapping[str, Any] | None = None,
        *,
        wait: float = 0.0,
        tags: Sequence[str] | None = None,
        metadata: Mapping[str, str | float | bool] | None = None,
        idempotency_key: str | None = None,
        **others: Any,  # noqa: ANN401 - other fields of the body: `upTo`, `pinned`, `callbackUrl`, `definition`
    ) -> AsyncRun:
        """Start a run of a workflow, given by its id or its exact name, and return the run.

        The request is repeated under one `Idempotency-Key`: a lost answer starts no second run. With `wait`,
        the answer comes after that many seconds, at most 60, or at the end of the run if that is earlier.
        `others` are further fields of the request.
        """
        workflow_id = await self.workflows.find(workflow)
        answer = await self.request(
            "POST",
            f"/api/v1/workflows/{quote_segment(workflow_id)}/execute",
            fields=run_states.start_fields(inputs, tags, metadata, others),
            headers=run_states.prefer_header(wait),
            idempotency_key=idempotency_key,
            is_keyed=True,
            wait=wait,
        )
        return AsyncRun(self, str(answer["executionId"]), answer if "status" in answer else None)

    async def run(
        self,
        workflow: str,
        inputs: Mapping[str, Any] | None = None,
        *,
        wait: float | None = None,
        tags: Sequence[str] | None = None,
        metadata: Mapping[str, str | float | bool] | None = None,
        idempotency_key: str | None = None,
        **others: Any,  # noqa: ANN401 - as `start`
    ) -> AsyncRun:
        """Run a workflow to its end and return the completed run, with its `outputs` by node id.

        `wait` is in seconds; None waits without end. Raises `RunFailed`, and `RunTimeout` after `wait`
        seconds; the run goes on then. The other arguments are those of `start`.
        """
        begun = time.monotonic()
        run = await self.start(
            workflow,
            inputs,
            wait=PREFER_SECONDS if wait is None else wait,
            tags=tags,
            metadata=metadata,
            idempotency_key=idempotency_key,
            **others,
        )
        await run.wait(wait, since=begun)
        run.outputs_or_raise()
        return run

    async def attach(self, execution_id: str) -> AsyncRun:
        """Return the run with an id and its present state; raises `NotFound`."""
        return await AsyncRun(self, execution_id).refresh()
