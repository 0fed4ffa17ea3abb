"""Copies of executions: new runs that begin with committed results of an ended one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct, field
from sqlalchemy import (
    Integer,
    Text,
    and_,
    bindparam,
    case,
    false,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    true,
)
from sqlalchemy.orm import aliased
from sqlalchemy.sql.expression import SQLColumnExpression
from sqlmodel import SQLModel, col

from engine.agents.agent_steps import StepKind, StepReuse, StepStatus
from engine.node_api import ERROR
from engine.replay_plan import ResultUse
from engine.run_records import CANDIDATE_STATUSES, NEEDS_CONFIRM_CODE, SpanStatus
from journal import run_labels, unparsed_mail
from journal.waits import completion
from json_text import decoding
from models import ids
from models.agent_step import AgentStepRow
from models.database_time import DatabaseTime
from models.execution import (
    LIMITED_TARGET,
    SHARED_TARGET,
    UNPARSED_TARGET,
    AttemptRow,
    Execution,
    ExecutionData,
    SpanRow,
)
from models.execution_status import MAX_PERCENT_UNDER_WAY, ExecutionStatus
from telemetry import run_origin

if TYPE_CHECKING:
    from sqlalchemy import Insert, Select
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.sql.expression import ColumnElement

    from journal.store import ExecutionKey

_SETTLED: Final = or_(
    col(SpanRow.status).in_([SpanStatus.COMPLETED, SpanStatus.SKIPPED]),
    and_(col(SpanRow.status) == SpanStatus.FAILED, col(SpanRow.port) == ERROR),
)
"""Nodes that do not run again.

These include failed nodes that left by their error port, and exclude failed iterations of loops.
"""
_IN_FLIGHT: Final = and_(col(SpanRow.status) == SpanStatus.RUNNING, col(SpanRow.resolved_config).is_not(None))
"""Writes with unknown outcome: they are repeated with the recorded key and body."""
_WAS_REFUSED: Final = and_(
    col(SpanRow.status) == SpanStatus.FAILED, col(SpanRow.error).like(f'{{"code":"{NEEDS_CONFIRM_CODE}"%')
)
"""Writes that a replay did not repeat for lack of a confirmation; a resumed run does not repeat them either."""
_KEPT: Final = or_(
    _SETTLED, _IN_FLIGHT, _WAS_REFUSED, *(col(SpanRow.status) == status for status in CANDIDATE_STATUSES)
)
"""Spans that a resumed run begins with; a replay's candidates are those that it has not reached."""
_RESUMED: Final[Mapping[str, SQLColumnExpression[Any]]] = {
    "status": case((_WAS_REFUSED, SpanStatus.UNCONFIRMED), else_=col(SpanRow.status)),
    "error": case((_WAS_REFUSED, null()), else_=col(SpanRow.error)),
    "ended_at": case((_WAS_REFUSED, null()), else_=col(SpanRow.ended_at)),
}
"""Changed columns of the spans of a resumed run."""
HAS_SETTLED_AGENT: Final = (
    select(col(SpanRow.node_id))
    .where(
        col(SpanRow.execution_id) == col(AgentStepRow.execution_id),
        col(SpanRow.node_id) == col(AgentStepRow.node_id),
        col(SpanRow.iteration) == col(AgentStepRow.iteration),
        _SETTLED,
    )
    .exists()
)
"""Condition: the agent of a step has a result."""
HAS_CONTENTS: Final = col(AgentStepRow.conversation).is_(None)
"""Condition: a run can continue behind a step, since its contents are recorded."""
_own = aliased(AgentStepRow)
IS_LEFT: Final = and_(
    col(AgentStepRow.reuse).is_not(None),
    col(AgentStepRow.reuse) != StepReuse.REUSED,
    select(col(_own.id))
    .where(
        *(
            col(_own.execution_id) == col(AgentStepRow.execution_id),
            col(_own.shard) == col(AgentStepRow.shard),
        ),
        *(col(_own.node_id) == col(AgentStepRow.node_id), col(_own.iteration) == col(AgentStepRow.iteration)),
        *(col(_own.kind) == StepKind.MODEL, col(_own.reuse).is_(None)),
        col(_own.number) < col(AgentStepRow.number),
    )
    .correlate(AgentStepRow)
    .exists(),
)
"""Condition: a recorded step lies behind a request of the replay itself, which has left that conversation."""
_NOT_YET: Final = (
    *("due_at", "lease_owner", "lease_until", "deadline_at"),
    *("request", "error", "started_at", "ended_at", "completion_due_at", "completion_outcome"),
    "settled_at",
)
"""Columns of an execution that are empty until its first claim, or until it has failed."""


class SkippedNode(Struct, frozen=True):
    """Node that a replay begins with as skipped."""

    label: str
    type: str
    keeps_request: bool
    """Whether its span keeps the recorded request: a later replay must know that the write may have happened."""
    keeps_key: bool
    """Whether it also keeps the key, so that a later replay may repeat the same request."""


class ReplayCopy(Struct, frozen=True):
    """Content of a replay, besides that of the execution that it replays."""

    definition_hash: str
    total_nodes: int
    timeout_seconds: float
    config: str | None
    """Settings as JSON text; None: those of the execution."""
    trigger: str | None
    """Output of the trigger as JSON text; None: that of the execution."""
    concurrency_key: str | None
    concurrency_limit: int | None
    completion_action: str | None
    """Completion actions."""
    spans: Mapping[ResultUse, Sequence[tuple[str, str]]]
    """Spans to begin with, as node ids and iterations, by their use."""
    steps: Mapping[str, StepReuse] = field(default_factory=dict)
    """Use of the recorded steps of agents, by their node ids and those of the tools that are agents."""
    has_outside_trigger: bool = False
    """Whether the output of the trigger may hold text of outsiders, whatever type the trigger has now."""
    left_out: Mapping[str, SkippedNode] = field(default_factory=dict)
    """Nodes that begin as skipped, by their ids."""


async def insert_copy(
    connection: AsyncConnection,
    failed: ExecutionKey,
    new_id: str,
    user_id: str,
    *,
    trigger_type: str,
    also: Mapping[str, SQLColumnExpression[Any]] | None = None,
    keeps_conversations: bool = True,
) -> None:
    """Insert the execution `new_id`, which resumes a failed one with its committed results, labels and attempts.

    It is pending: it waits for parsing if its mail is unparsed, and then for a slot if it has a concurrency key.
    `trigger_type` is that of the failed one, and `also` has values of columns that differ from the failed one. Agents
    without a result continue their conversations, or begin new ones unless `keeps_conversations`.
    """
    kept = select(col(SpanRow.node_id), col(SpanRow.iteration), _SETTLED.label("is_settled")).where(
        _spans_of(failed), _KEPT
    )
    spans = (await connection.execute(kept)).all()
    settled_nodes = sum(bool(row.is_settled) and not row.iteration for row in spans)
    changes: dict[str, SQLColumnExpression[Any]] = {
        "completed_nodes": literal(settled_nodes),
        "progress": case(
            (
                col(Execution.total_nodes) > 0,
                MAX_PERCENT_UNDER_WAY * settled_nodes // col(Execution.total_nodes),
            ),
            else_=0,
        ),
        "completion_action": literal(await _completion_action(connection, failed, trigger_type), Text()),
        **(also or {}),
    }
    if await connection.scalar(_unparsed_statement(failed)):
        changes["target"] = literal(UNPARSED_TARGET)
    await connection.execute(_new_execution(failed, new_id, user_id, changes))
    await connection.execute(_new_data(failed, new_id))
    await run_labels.copy_labels(connection, failed, new_id)
    if spans:
        copies = [
            {"new_id": ids.new_id("span"), "of_node": row.node_id, "of_iteration": row.iteration}
            for row in spans
        ]
        await connection.execute(_new_span(failed, new_id, _RESUMED), copies)
        await _copy_attempts(connection, failed, new_id)
    if keeps_conversations:
        # Steps of agents that have no result, so that they continue.
        await _copy_steps(connection, failed, new_id, and_(HAS_CONTENTS, ~HAS_SETTLED_AGENT), {})


async def insert_replay(
    connection: AsyncConnection, source: ExecutionKey, new_id: str, user_id: str, replay: ReplayCopy
) -> None:
    """Insert the execution `new_id`, a replay of an ended one, with labels and the results that `replay` reuses.

    It runs the definition, settings and trigger that `replay` names. It is pending; with a concurrency key it waits for
    a slot, and for parsing if its mail is unparsed.
    """
    changes: dict[str, SQLColumnExpression[Any]] = {
        "completed_nodes": literal(len(replay.spans[ResultUse.SETTLED])),
        "progress": literal(0),
        "total_nodes": literal(replay.total_nodes),
        "definition_hash": literal(replay.definition_hash),
        "timeout_microseconds": literal(int(replay.timeout_seconds * 1_000_000)),
        "concurrency_key": literal(replay.concurrency_key, Text()),
        "concurrency_limit": literal(replay.concurrency_limit, Integer()),
        "target": case(
            (literal(replay.concurrency_key, Text()).is_not(None), LIMITED_TARGET),
            else_=func.coalesce(col(Execution.assigned_deployment_id), SHARED_TARGET),
        ),
        "resumed_from": null(),
        "replay_of": col(Execution.id),
        "is_tainted": or_(col(Execution.is_tainted), literal(replay.has_outside_trigger)),
        "write_key_id": literal(new_id),
        "completion_action": literal(replay.completion_action, Text()),
    }
    if replay.trigger is None and await connection.scalar(_unparsed_statement(source)):
        changes["target"] = literal(UNPARSED_TARGET)
    await connection.execute(_new_execution(source, new_id, user_id, changes))
    await connection.execute(_new_data(source, new_id, trigger=replay.trigger, config=replay.config))
    await run_labels.copy_labels(connection, source, new_id)
    written_under = select(func.coalesce(col(Execution.write_key_id), col(Execution.key_id))).where(
        col(Execution.id) == source.execution_id
    )
    key_id: str = (await connection.execute(written_under)).scalar_one()
    for use, spans in replay.spans.items():
        copies = [
            {"new_id": ids.new_id("span"), "of_node": node_id, "of_iteration": iteration}
            for node_id, iteration in spans
        ]
        if copies:
            await connection.execute(_new_span(source, new_id, _span_changes(use, source, key_id)), copies)
    if replay.left_out:
        await _insert_skipped(connection, source, new_id, replay.left_out, key_id)
    for reuse in sorted(set(replay.steps.values())):
        agents = [node_id for node_id, use in replay.steps.items() if use is reuse]
        is_answered = or_(
            col(AgentStepRow.kind) == StepKind.TOOL, col(AgentStepRow.status) == StepStatus.COMPLETED
        )
        wanted = and_(col(AgentStepRow.node_id).in_(agents), is_answered, HAS_CONTENTS, ~IS_LEFT)
        await _copy_steps(connection, source, new_id, wanted, {"reuse": literal(reuse.value)})


async def _insert_skipped(
    connection: AsyncConnection,
    source: ExecutionKey,
    new_id: str,
    nodes: Mapping[str, SkippedNode],
    key_id: str,
) -> None:
    """Insert spans of skipped nodes into a replay; a write that may have happened keeps its recorded request.

    `key_id` is the execution id in the idempotency keys of nodes, stored with copied spans that have none.
    """
    empty = (
        *("port", "error", "output", "output_blob", "input_node", "input", "input_blob", "started_at"),
        *("ended_at", "wake_at", "awaits", "reused_from", "model_calls", "unresolved"),
    )
    changes: dict[str, SQLColumnExpression[Any]] = {
        "status": literal(SpanStatus.SKIPPED.value),
        "key_id": func.coalesce(col(SpanRow.key_id), literal(key_id)),
        **{name: null() for name in empty},
    }
    for node_id, node in nodes.items():
        span_id = ids.new_id("span")
        if node.keeps_request:
            also = {} if node.keeps_key else {"hashes": null()}
            copied = {"new_id": span_id, "of_node": node_id, "of_iteration": ""}
            await connection.execute(_new_span(source, new_id, {**changes, **also}), [copied])
            continue
        row = SpanRow(
            execution_id=new_id,
            node_id=node_id,
            shard=source.shard,
            id=span_id,
            sequence=0,
            label=node.label,
            type=node.type,
            status=SpanStatus.SKIPPED,
        )
        await connection.execute(insert(SpanRow).values(row.model_dump()))


def _span_changes(use: ResultUse, source: ExecutionKey, key_id: str) -> dict[str, SQLColumnExpression[Any]]:
    """Return the columns in which a span that a replay begins with differs from the recorded one.

    By `use`, the result is taken over as settled, is a candidate that the run may take, or its node runs again with the
    same write key. `key_id` is the execution id in this key, for spans that have recorded none.
    """
    origin = func.coalesce(col(SpanRow.reused_from), source.execution_id)
    own_key = func.coalesce(col(SpanRow.key_id), key_id)
    # The end of a candidate is kept in `wake_at`: a span with an end counts as ended everywhere.
    # Not `in_`, which a statement for many rows can't contain.
    is_candidate = or_(*(col(SpanRow.status) == status for status in sorted(CANDIDATE_STATUSES)))
    ended_at = case((is_candidate, col(SpanRow.wake_at)), else_=col(SpanRow.ended_at))
    if use is ResultUse.SETTLED:
        end = case((col(SpanRow.error).is_(None), SpanStatus.COMPLETED), else_=SpanStatus.FAILED)
        status = case((is_candidate, end), else_=col(SpanRow.status))
        changes = {"reused_from": origin, "key_id": own_key, "status": status}
        return {**changes, "ended_at": ended_at, "wake_at": null()}
    if use is ResultUse.IN_FLIGHT:
        return {
            "status": literal(SpanStatus.RUNNING.value),
            # The replay has all attempts of the node again.
            "attempt": literal(0),
            "key_id": own_key,
            **{name: null() for name in ("port", "error", "ended_at", "wake_at", "awaits", "reused_from")},
        }
    changes = {"reused_from": origin, "key_id": own_key, "status": literal(use.value)}
    return {**changes, "ended_at": null(), "wake_at": ended_at}


async def _copy_attempts(connection: AsyncConnection, failed: ExecutionKey, new_id: str) -> None:
    """Copy the records of attempts of nodes whose spans the new execution keeps; other nodes begin with attempt 1."""
    identity = (col(AttemptRow.node_id), col(AttemptRow.iteration), col(AttemptRow.attempt))
    of_kept = and_(
        *(
            col(AttemptRow.execution_id) == col(SpanRow.execution_id),
            col(AttemptRow.shard) == col(SpanRow.shard),
        ),
        *(
            col(AttemptRow.node_id) == col(SpanRow.node_id),
            col(AttemptRow.iteration) == col(SpanRow.iteration),
        ),
    )
    kept = select(*identity).join(SpanRow, of_kept).where(_spans_of(failed), _KEPT)
    copies = [
        {"new_id": ids.new_id("span"), "of_node": row[0], "of_iteration": row[1], "of_attempt": row[2]}
        for row in await connection.execute(kept)
    ]
    if not copies:
        return
    condition = and_(
        *(col(AttemptRow.execution_id) == failed.execution_id, col(AttemptRow.shard) == failed.shard),
        col(AttemptRow.node_id) == bindparam("of_node"),
        col(AttemptRow.iteration) == bindparam("of_iteration"),
        col(AttemptRow.attempt) == bindparam("of_attempt"),
    )
    changes = {"execution_id": literal(new_id), "id": bindparam("new_id", type_=Text())}
    await connection.execute(_copy_rows("attempt_span", changes, condition), copies)


async def _copy_steps(
    connection: AsyncConnection,
    source: ExecutionKey,
    new_id: str,
    wanted: ColumnElement[bool],
    also: Mapping[str, SQLColumnExpression[Any]],
) -> None:
    """Copy steps of agents that satisfy `wanted`, with the changed columns `also`; their cost stays with the run that
    had it.
    """
    of_run = and_(
        col(AgentStepRow.execution_id) == source.execution_id, col(AgentStepRow.shard) == source.shard
    )
    place = (col(AgentStepRow.node_id), col(AgentStepRow.iteration), col(AgentStepRow.number))
    copies = [
        {"new_id": ids.new_id("step"), "of_node": row[0], "of_iteration": row[1], "of_number": row[2]}
        for row in await connection.execute(select(*place).where(of_run, wanted))
    ]
    if not copies:
        return
    condition = and_(
        of_run,
        col(AgentStepRow.node_id) == bindparam("of_node"),
        col(AgentStepRow.iteration) == bindparam("of_iteration"),
        col(AgentStepRow.number) == bindparam("of_number"),
    )
    changes: dict[str, SQLColumnExpression[Any]] = {
        "execution_id": literal(new_id),
        "id": bindparam("new_id", type_=Text()),
        "model_calls": null(),
        "cost": null(),
        **also,
    }
    await connection.execute(_copy_rows("execution_step", changes, condition), copies)


async def _completion_action(
    connection: AsyncConnection, failed: ExecutionKey, trigger_type: str
) -> str | None:
    """Return the completion actions of the new execution as JSON text, from the settings of the failed one;
    None for none.

    The callbacks of the failed one were sent at its end and are not repeated. A run that a failure started
    has no actions.
    """
    if trigger_type == completion.ON_FAILURE_TRIGGER:
        return None
    config = select(col(ExecutionData.config)).where(
        col(ExecutionData.execution_id) == failed.execution_id, col(ExecutionData.shard) == failed.shard
    )
    return completion.requested_actions(decoding.decode(await connection.scalar(config) or "{}"))


def _new_execution(
    failed: ExecutionKey, new_id: str, user_id: str, also: Mapping[str, SQLColumnExpression[Any]]
) -> Insert:
    """Return the statement that inserts a pending copy of an execution under a new id, as a resumption of it.

    `also` has columns with other values. A copy with a concurrency key waits for a slot.
    """
    now = DatabaseTime()
    changes: dict[str, SQLColumnExpression[Any]] = {
        "id": literal(new_id),
        "user_id": literal(user_id),
        "status": literal(ExecutionStatus.PENDING.value),
        "target": case(
            (
                col(Execution.concurrency_key).is_(None),
                func.coalesce(col(Execution.assigned_deployment_id), SHARED_TARGET),
            ),
            else_=LIMITED_TARGET,
        ),
        "rank": now,
        "is_fresh": true(),
        "token": literal(0),
        "attempt": literal(0),
        "isolated": false(),
        "isolation_losses": literal(0),
        "wait_answer_count": literal(0),
        "resumed_from": col(Execution.id),
        "has_journal": true(),
        "channel": literal(""),
        "created_at": now,
        "updated_at": now,
        "trace_origin": literal(run_origin.current_origin(), Text()),
        **{name: null() for name in _NOT_YET},
        **also,
    }
    condition = and_(col(Execution.id) == failed.execution_id, col(Execution.shard) == failed.shard)
    return _copy_rows("execution", changes, condition)


def _unparsed_statement(failed: ExecutionKey) -> Select[bool]:
    """Return the statement that tells whether the mail that started a run is still unparsed."""
    return select(unparsed_mail.is_unparsed_column(col(ExecutionData.trigger))).where(
        col(ExecutionData.execution_id) == failed.execution_id, col(ExecutionData.shard) == failed.shard
    )


def _new_data(
    failed: ExecutionKey, new_id: str, *, trigger: str | None = None, config: str | None = None
) -> Insert:
    """Return the statement that copies trigger and config of a failed run to a new one; a text that isn't
    None replaces the copy.
    """
    condition = and_(
        col(ExecutionData.execution_id) == failed.execution_id, col(ExecutionData.shard) == failed.shard
    )
    changes: dict[str, SQLColumnExpression[Any]] = {
        "execution_id": literal(new_id),
        "created_at": DatabaseTime(),
        **({} if trigger is None else {"trigger": literal(trigger, Text())}),
        **({} if config is None else {"config": literal(config, Text())}),
    }
    return _copy_rows("execution_data", changes, condition)


def _new_span(
    failed: ExecutionKey, new_id: str, also: Mapping[str, SQLColumnExpression[Any]] | None = None
) -> Insert:
    """Return the statement that copies one span to a new run; `also` has columns with other values.

    Its parameters are `of_node`, `of_iteration` and `new_id`.
    """
    condition = and_(
        _spans_of(failed),
        col(SpanRow.node_id) == bindparam("of_node"),
        col(SpanRow.iteration) == bindparam("of_iteration"),
    )
    changes: dict[str, SQLColumnExpression[Any]] = {
        "execution_id": literal(new_id),
        "id": bindparam("new_id", type_=Text()),
        # The cost of a call belongs to the run that made it.
        "model_calls": null(),
        **(also or {}),
    }
    return _copy_rows("span", changes, condition)


def _spans_of(failed: ExecutionKey) -> ColumnElement[bool]:
    return and_(col(SpanRow.execution_id) == failed.execution_id, col(SpanRow.shard) == failed.shard)


def _copy_rows(
    table: str, changes: Mapping[str, SQLColumnExpression[Any]], condition: ColumnElement[bool]
) -> Insert:
    """Return the statement that copies the rows of a table that satisfy a condition, with some columns changed."""
    columns = SQLModel.metadata.tables[table].columns
    selected = select(*(changes.get(column.name, column) for column in columns)).where(condition)
    return insert(SQLModel.metadata.tables[table]).from_select([column.name for column in columns], selected)
