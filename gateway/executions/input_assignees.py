"""Assignees of an open question; a request replaces them by other people of the organization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import structlog
from msgspec import Meta
from msgspec.structs import replace
from sqlalchemy import func, or_, select
from sqlmodel import col

from engine.values import fingerprint
from gateway.access import audit_log
from gateway.executions import inputs
from gateway.http import errors, limits
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import StrictWire, WireStruct, body_of, read_json
from journal.waits import approvals
from journal.waits.node_answers import AnswerReception
from models.access import User, UserRole
from models.audit import AuditAction
from models.column_types import build_row
from models.execution import Execution
from models.execution_visibility import visibility_condition
from models.ingest import INTAKE_KINDS

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json
    from gateway.http.errors import ApiError
    from journal.store import ExecutionKey
    from journal.waits.node_answers import WaitingNode
    from models.access import ApiCaller

log = structlog.get_logger()


class AssigneeChange(StrictWire):
    """New assignees of a question."""

    node_id: Annotated[str, Meta(min_length=1, max_length=64)]
    assignees: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=320)]], Meta(min_length=1, max_length=50)
    ]
    """Ids or mail addresses of users of the organization, or `role:admin`. Addresses of people without an account are
    accepted if the question has them already.
    """
    iteration: Annotated[str, Meta(max_length=limits.LABEL_LENGTH)] | None = None
    """Required if several iterations of a loop wait, and for the tool call of an agent."""


class AssigneeChangeResult(WireStruct):
    """Question with its new assignees."""

    execution_id: str
    node_id: str
    iteration: str
    assignees: Sequence[str]


async def assign(request: GatewayRequest) -> JsonResponse:
    """Assign an open question to other people of the organization, instead of its current assignees.

    Its current assignees and admins may do so. Answers so far count on, a rule against the starter of the run stays,
    and earlier assignees can no longer answer, also by their links. If the question is sent by mail, the new assignees
    get one.
    """
    gateway, caller = request.gateway, request.caller
    key = await gateway.access.find_key(request.path_params["id"], caller)
    body = body_of(request, await read_json(request), AssigneeChange)

    async def work(connection: AsyncConnection) -> tuple[WaitingNode, Sequence[str]]:
        run = await approvals.lock_run(connection, key)
        if run is None:
            raise errors.not_found("execution")
        asked = await inputs.find_waiting_node(connection, key, body.node_id, body.iteration)
        if asked.expires_at is not None and asked.expires_at <= gateway.clock():
            raise inputs.refusal_of(AnswerReception.EXPIRED)
        if not caller.is_admin:
            await inputs.require_assigned(connection, key, asked, caller)
        users = await _read_users(connection, caller, body.assignees)
        assignees = _resolve_assignees(body.assignees, users, approvals.assignees_of(asked.request))
        voters = (await approvals.read_votes(connection, [key.execution_id])).get(
            (key.execution_id, asked.node_id, asked.iteration), ()
        )
        if "notify" not in asked.request:
            await _require_visible(connection, key, caller, users, assignees)
        _require_enough_people(asked, assignees, {one.voter for one in voters}, run)
        await approvals.replace_assignees(connection, key, asked, assignees)
        place: list[Json] = [key.execution_id, asked.node_id, asked.iteration]
        await audit_log.record_change(
            connection,
            caller,
            AuditAction.INPUT_REASSIGNED,
            str(run.workflow_id),
            before=fingerprint([*place, list(approvals.assignees_of(asked.request))]),
            after=fingerprint([*place, list(assignees)]),
        )
        return asked, assignees

    asked, assignees = await gateway.database.transaction(work, locks=key.execution_id)
    log.info("input reassigned", execution_id=key.execution_id, node_id=asked.node_id, user_id=caller.user_id)
    return JsonResponse(
        AssigneeChangeResult(
            execution_id=key.execution_id,
            node_id=asked.node_id,
            iteration=asked.iteration,
            assignees=assignees,
        )
    )


async def _read_users(
    connection: AsyncConnection, caller: ApiCaller, names: Sequence[str]
) -> Mapping[str, User]:
    """Return the users among `names` (ids or mail addresses) that may answer, members and admins of the caller's
    organization.

    Each is returned by its id and by its mail address in lower case; unknown names are left out.
    """
    addresses = [one.casefold() for one in names if "@" in one]
    statement = select(User).where(
        col(User.organization_id) == caller.organization_id,
        col(User.role) != UserRole.VIEWER,
        or_(col(User.id).in_(names), func.lower(col(User.email)).in_(addresses)),
    )
    users = [build_row(User, row) for row in (await connection.execute(statement)).mappings()]
    return {one.id: one for one in users} | {one.email.casefold(): one for one in users}


def _resolve_assignees(
    names: Sequence[str], users: Mapping[str, User], current: Sequence[str]
) -> Sequence[str]:
    """Return the assignees that `names` mean, users by their ids, without repetition; raises a 422 error that lists
    each unknown name.

    `users` are those of `_read_users`. The role of admins is accepted, too, but mail addresses without a user only if
    they are among the `current` assignees.
    """
    kept = {approvals.ADMIN_ROLE, *(approvals.fold_assignee(one) for one in current if "@" in one)}
    folded = [approvals.fold_assignee(one) for one in names]
    problems = [
        errors.problem(
            f"assignees.{number}",
            "unknown-assignee",
            f"{name} is neither a user of the organization who may answer nor {approvals.ADMIN_ROLE}",
        )
        for number, name in enumerate(folded)
        if name not in users and name not in kept
    ]
    if problems:
        raise errors.invalid(problems)
    return list(dict.fromkeys(users[one].id if one in users else one for one in folded))


async def _require_visible(
    connection: AsyncConnection,
    key: ExecutionKey,
    caller: ApiCaller,
    users: Mapping[str, User],
    assignees: Sequence[str],
) -> None:
    """Raise a 422 error if users among the assignees have no access to the run: they would never find its question.

    Call it only for a question that is not sent by mail; otherwise its link reaches them.
    """
    problems = []
    for user in (users[one] for one in assignees if one in users):
        person = replace(caller, user_id=user.id, role=UserRole(user.role))
        is_visible = select(col(Execution.id)).where(
            col(Execution.id) == key.execution_id, visibility_condition(person)
        )
        if await connection.scalar(is_visible) is None:
            message = f"{user.email} can't see this execution: share the workflow with them first"
            problems.append(errors.problem("assignees", "no-access", message))
    if problems:
        raise errors.invalid(problems)


def _require_enough_people(
    asked: WaitingNode, assignees: Sequence[str], voters: set[str], run: Row[*tuple[str, str, str]]
) -> None:
    """Raise a 422 error if the assignees and the people who voted, `voters`, are fewer in all than the approvals that
    the question needs.

    A role counts as any number. The user of `run` does not count if the question excludes the person who started it.
    """
    if approvals.ADMIN_ROLE in assignees:
        return
    people = {*assignees, *voters}
    if run.trigger_type not in INTAKE_KINDS and not approvals.allows_self(asked.request):
        people.discard(run.user_id)
    needed = approvals.needed_approvals(asked.request)
    if len(people) < needed:
        raise _too_few(needed, len(people))


def _too_few(needed: int, count: int) -> ApiError:
    message = (
        f"{needed} people must answer, and {count} of these may: the user who started the run does not count"
        " unless the question allows it"
    )
    return errors.invalid([errors.problem("assignees", "too-few", message)])
