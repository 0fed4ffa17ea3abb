"""Endpoint that compares a node of a run with the same node of another run: config, input and output by path."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

from msgspec import UNSET, Meta, Raw, UnsetType, field

from engine.values import MISSING, compare_values
from gateway.executions import execution_shapes, run_graph_rows, span_details
from gateway.executions.execution_rows import ShownSpanStatus
from gateway.executions.execution_shapes import StepQuestions
from gateway.executions.executions import ITERATION
from gateway.executions.span_details import BLOB
from gateway.http import errors
from gateway.http.parameters import TextParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse
from gateway.http.wire import Instant, WireStruct
from journal.store import ExecutionKey
from json_text import decoding

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.values import Json, PathChange
    from gateway.executions.execution_shapes import SpanDetailsShape
    from gateway.executions.span_details import SpanDetails
    from gateway.state import GatewayState

MAX_CHANGES: Final = 200
"""Changes that are shown of each part."""
WITH = TextParameter(
    "with", "Execution to compare with; by default the newest completed run of the workflow before this one."
)
COMPARED: Final = (WITH, ITERATION)


class PathChangeShape(WireStruct):
    """Values at a path that differ: `before` is that of the other run. An absent side has no value there."""

    path: str
    """Such as `rows[0].currency`; empty for the whole value."""
    before: Any | UnsetType = UNSET
    after: Any | UnsetType = UNSET


class PartComparison(WireStruct):
    """Differences of one part of a node's data."""

    changes: Annotated[Sequence[PathChangeShape], Meta(max_length=MAX_CHANGES)]
    equal_paths: int
    """Number of equal values, without objects and lists."""
    is_cut: bool
    """Whether there are more changes."""


class ComparedSpan(WireStruct):
    """Span of the other run."""

    execution_id: str
    span_id: str
    status: Annotated[str, Meta(extra_json_schema={"enum": [*ShownSpanStatus]})]
    started_at: Instant | None
    duration_ms: int | None


class SpanComparison(WireStruct):
    """Differences between a node of a run and the same node of another run."""

    execution_id: str
    node_id: str
    iteration: str
    with_: ComparedSpan | None = field(name="with")
    """Null if there is no such run, or the node did not run there."""
    definition: PartComparison | None
    """Config in the definitions, with its expressions and without credentials; null without anything to compare."""
    config: PartComparison | None
    """Config as rendered; null if it was not recorded on both sides, as `output` if it is not on both."""
    input: PartComparison | None
    output: PartComparison | None


async def compare(request: GatewayRequest) -> JsonResponse:
    """Compare a node of an execution with the same node and iteration of another one.

    Values over 256 kB are compared by their hashes.
    """
    gateway, caller = request.gateway, request.caller
    key = await gateway.access.find_key(request.path_params["id"], caller)
    wanted = request.query[WITH]
    other_key = None if wanted is None else await gateway.access.find_key(wanted, caller)
    async with gateway.database.read_snapshot() as connection:
        found = await span_details.read_span(
            connection, key, request.path_params["sub"], request.query[ITERATION] or ""
        )
        if found is None:
            raise errors.not_found("span")
        if other_key is None:
            other_key = await _find_default(connection, key)
        other = None
        if other_key is not None:
            span = found.span
            other = await span_details.read_span(connection, other_key, span.node_id, span.iteration)
        if other is not None and other.span.status == ShownSpanStatus.SKIPPED:
            other = None
    shown = await asyncio.to_thread(_compare, request.gateway, found, other)
    return JsonResponse(shown)


async def _find_default(connection: AsyncConnection, key: ExecutionKey) -> ExecutionKey | None:
    """Return the newest completed run of the workflow before a run, for a comparison; None without one.

    Raises a 404 error for a run that is gone.
    """
    head = await run_graph_rows.read_head(connection, key)
    if head is None:
        raise errors.not_found("execution")
    found = await run_graph_rows.find_completed_before(connection, key, head)
    return None if found is None else ExecutionKey(found, key.shard)


def _compare(gateway: GatewayState, found: SpanDetails, other: SpanDetails | None) -> SpanComparison:
    """Return the differences of definition, config, input and output between two spans, of which `other` is the earlier
    side.

    A span is one execution of a node. A part that either side lacks has None; without the other span, all have.
    """
    span = found.span
    if other is None:
        return SpanComparison(
            execution_id=span.execution_id,
            node_id=span.node_id,
            iteration=span.iteration,
            with_=None,
            definition=None,
            config=None,
            input=None,
            output=None,
        )
    before, after = [_show(gateway, one) for one in (other, found)]
    return SpanComparison(
        execution_id=after.execution_id,
        node_id=after.node_id,
        iteration=after.iteration,
        with_=ComparedSpan(
            execution_id=before.execution_id,
            span_id=before.id,
            status=before.status,
            started_at=before.started_at,
            duration_ms=before.duration_ms,
        ),
        definition=_compare_values(span_details.defined_config(other), span_details.defined_config(found)),
        config=_compare_part(before.config, after.config),
        input=_compare_part(before.input_data, after.input_data),
        output=_compare_part(before.output_data, after.output_data),
    )


def _show(gateway: GatewayState, details: SpanDetails) -> SpanDetailsShape:
    """Return a span as the API shows it, with its config, and large outputs explained."""
    config = span_details.show_config(details, gateway.catalog)
    execution_id = details.span.execution_id
    questions = StepQuestions(gateway.settings.public_url, execution_id, details.questions)
    outputs = gateway.large_outputs.explain(execution_id)
    return execution_shapes.show_span_details(details, config, outputs, questions)


def _compare_part(before: Raw | None, after: Raw | None) -> PartComparison | None:
    if before is None or after is None:
        return None
    return _compare_values(_decode(before), _decode(after))


def _compare_values(before: Json, after: Json) -> PartComparison:
    found = compare_values(before, after, at_most=MAX_CHANGES)
    return PartComparison(
        changes=[_show_change(change) for change in found.changes],
        equal_paths=found.equal_paths,
        is_cut=found.is_cut,
    )


def _decode(text: Raw) -> Json:
    """Return a JSON text decoded for a comparison; of a value in a blob, the reference without the address
    that each run has.
    """
    value = decoding.decode(bytes(text))
    if isinstance(value, dict) and BLOB in value:
        return {BLOB: value[BLOB]}
    return cast("Json", value)


def _show_change(change: PathChange) -> PathChangeShape:
    return PathChangeShape(
        path=change.path,
        before=UNSET if change.before is MISSING else change.before,
        after=UNSET if change.after is MISSING else change.after,
    )
