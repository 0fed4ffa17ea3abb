"""Changes of deployments that users request: applied, audited, sent to the deployer, and waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from hashlib import sha256
from typing import TYPE_CHECKING

from engine.values import encode_canonical, fingerprint
from gateway.access import audit_log
from gateway.http import errors
from gateway.workflows import editing
from journal import definition_snapshot
from journal.deployments import activity, desired_state
from journal.deployments.desired_state import DeployRequest
from messages import wakeups
from models import deployment_token
from models.audit import AuditAction
from models.deployment import DeploymentStatus, blocked_reason, status_of
from models.lifecycle_policy import LifecycleAction

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.executions.long_poll import ExecutionPollHub
    from gateway.http.preconditions import RequestedObject
    from gateway.workflows.stored_workflow import StoredWorkflow
    from journal.definition_snapshot import NodeTypeRegistry
    from journal.deployments.activity import DeploymentActivity
    from messages.broker import Broker
    from models.access import ApiCaller
    from models.database import Database
    from models.deployment import Deployment
    from models.lifecycle_policy import LifecycleVerdict, StoppedReason

Decide = Callable[["DeploymentActivity"], "LifecycleVerdict"]


def not_deployed() -> errors.ApiError:
    return errors.conflict("not-deployed", "The workflow is not deployed: deploy it first")


async def deploy_workflow(
    connection: AsyncConnection,
    caller: ApiCaller,
    stored: StoredWorkflow,
    snapshot: Mapping[str, Any],
    catalog: NodeTypeRegistry,
    *,
    version: int,
    token_id: str,
    secret: bytes,
) -> Deployment:
    """Deploy the definition of a snapshot of the workflow `stored` in the transaction of `connection`, and return the
    deployment.

    `version` is the number of the snapshot. `token_id` is the id of a token for its pods, created before the
    transaction so that a repetition has the same; the token is derived from it and `secret`. If the same definition and
    version is deployed already, with pods that are desired and have not failed, they stay. The audit trail gets an
    entry in either case.
    """
    workflow = stored.workflow
    text = await asyncio.to_thread(_encode_definition, snapshot, catalog)
    order = DeployRequest(
        workflow_id=workflow.id,
        organization_id=workflow.organization_id,
        shard=workflow.shard,
        user_id=caller.user_id,
        version=version,
        definition=text.decode(),
        definition_hash=sha256(text).hexdigest(),
        token_id=token_id,
    )
    before = await desired_state.find_deployment(connection, workflow.id)
    after = await desired_state.deploy_workflow(connection, order, secret=secret)
    await _record(connection, caller, AuditAction.WORKFLOW_DEPLOYED, before, after)
    return after


async def undeploy_workflow(
    connection: AsyncConnection,
    caller: ApiCaller,
    workflow_id: str,
    *,
    reason: StoppedReason | None = None,
) -> None:
    """Undeploy a workflow in the transaction; its accepted runs belong to the workers from then on.

    Nothing happens if it isn't deployed; otherwise the audit trail gets an entry. `reason` is None for a
    request of a user.
    """
    before = await desired_state.find_deployment(connection, workflow_id)
    after = await desired_state.undeploy_workflow(
        connection, workflow_id, user_id=caller.user_id, reason=reason
    )
    if after is not None:
        await _record(connection, caller, AuditAction.WORKFLOW_UNDEPLOYED, before, after)


async def change_deployment(
    database: Database,
    requested: RequestedObject,
    action: AuditAction,
    decide: Decide,
    *,
    replicas: int | None = None,
) -> Deployment:
    """Lock the deployment of the requested workflow, apply the decision of `decide` to it, and return it as it is then.

    A decision without an action changes nothing; another one gets an audit entry with `action`. `replicas` None keeps
    the number of pods. The caller notifies the deployer. Raises 404, 403, and 409 if the workflow isn't deployed.
    """
    workflow_id, caller = requested.id, requested.caller

    async def work(connection: AsyncConnection) -> Deployment:
        stored = await editing.find_readable(connection, requested)
        editing.require_writer(caller, stored.workflow)
        await activity.lock_deployment(connection, workflow_id)
        seen = await activity.read_activity(connection, workflow_id)
        if seen is None or not seen.deployment.is_deployed:
            raise not_deployed()
        decision = decide(seen)
        if decision.action is LifecycleAction.NONE:
            return seen.deployment
        after = await activity.apply_decision(
            connection, seen, decision, replicas=replicas, user_id=caller.user_id
        )
        await _record(connection, caller, action, seen.deployment, after)
        return after

    return await database.transaction(work, locks=f"deployment:{workflow_id}")


class DeployerClient:
    """Client of the deployer: notifies it of changed deployments and waits for their effect."""

    def __init__(
        self,
        database: Database,
        broker: Broker,
        waiting: ExecutionPollHub,
        settle_seconds: float,
    ) -> None:
        self._database = database
        self._broker = broker
        self._waiting = waiting
        self._settle_seconds = settle_seconds

    async def notify(self, workflow_id: str) -> None:
        """After the commit, wake the deployer for a workflow, and the workers, to which its runs go if it was
        undeployed.

        A lost notification only delays them.
        """
        await wakeups.wake_deployer(self._broker, workflow_id)
        await wakeups.wake_workers(self._broker)

    async def await_state(
        self, workflow_id: str, is_reached: Callable[[Deployment], bool]
    ) -> Deployment | None:
        """Return a deployment once `is_reached` holds, it failed or lacks capacity, or the time limit of this
        object is over.

        None if the workflow was never deployed. The result does not tell which was the case: callers check its state.
        """
        waiting, key = self._waiting, wakeups.deployment_watch_key(workflow_id)
        with waiting.waiter(key) as waiter:
            timer = asyncio.get_running_loop().call_later(self._settle_seconds, waiter.end)
            try:
                while True:
                    waiter.changed.clear()
                    was_watched = waiting.is_watched(key)
                    async with self._database.read() as connection:
                        deployment = await desired_state.find_deployment(connection, workflow_id)
                    if deployment is None or waiter.is_over or is_reached(deployment):
                        return deployment
                    if has_failed(deployment) or blocked_reason(deployment) is not None:
                        return deployment
                    if was_watched or not await waiting.watch([key]):
                        await waiter.changed.wait()
            finally:
                timer.cancel()


def has_failed(deployment: Deployment) -> bool:
    """Return whether the pods of a deployment can't start, by its stored observed state."""
    return status_of(deployment) is DeploymentStatus.FAILED


def fresh_token_id() -> str:
    """Return a new id for the token of a deployment's pods; create it before the transaction, which may be
    repeated.
    """
    return deployment_token.new_token_id()


def _encode_definition(snapshot: Mapping[str, Any], catalog: NodeTypeRegistry) -> bytes:
    return encode_canonical(
        definition_snapshot.build_definition(
            snapshot["nodes"], snapshot["connections"], snapshot["settings"], catalog
        )
    )


async def _record(
    connection: AsyncConnection,
    caller: ApiCaller,
    action: AuditAction,
    before: Deployment | None,
    after: Deployment,
) -> None:
    """Record a change of a deployment in the audit trail, with hashes of its desired state before and after."""
    await audit_log.record_change(
        connection,
        caller,
        action,
        after.workflow_id,
        before=_content_hash(before),
        after=_content_hash(after),
    )


def _content_hash(deployment: Deployment | None) -> str | None:
    """Return the SHA-256 of the desired state for the audit trail; None for a workflow that isn't deployed."""
    if deployment is None or not deployment.is_deployed:
        return None
    wanted = {
        "definition": deployment.definition_hash,
        "version": deployment.version,
        "replicas": deployment.replicas,
        "drains": deployment.drain_until is not None,
        "stopped": None if deployment.stopped_reason is None else str(deployment.stopped_reason),
    }
    return fingerprint(wanted)
