"""Inputs of nodes: gathering from parents, input mappings, and the call of the implementation."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from typing import TYPE_CHECKING, Any, cast

from msgspec import structs

from engine import content_recording, node_key, values
from engine.expressions import MISSING, ExpressionError, ValueTemplate, compile_path
from engine.frames import NodeVisit
from engine.joins import JoinMode
from engine.node_api import NO_MODEL_CALLS, ModelCallLog, NodeCall
from engine.program import EVERY_NODE
from engine.run_errors import LeaseLost, NodeError
from engine.run_records import SpanStatus
from engine.services import idempotency_key_of
from json_text import decoding

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from engine.agents.agent_steps import AgentStep
    from engine.expressions import ExpressionPath
    from engine.frames import SectionFrame
    from engine.model_calls import ModelCallRecord
    from engine.program import AgentProgram, NodeProgram, WorkflowProgram
    from engine.run_records import NodeSpan
    from engine.services import NodeServices, RunCaller
    from engine.span_recorder import SpanRecorder
    from engine.values import Json


class NodeInputs:
    """Preparation of the nodes of one run."""

    def __init__(
        self,
        program: WorkflowProgram,
        caller: RunCaller,
        services: NodeServices,
        recorder: SpanRecorder,
        steps: Sequence[AgentStep] = (),
        is_interrupted: Callable[[], bool] = lambda: False,
        find_answer: Callable[[tuple[str, str]], bytes | None] = lambda _place: None,
    ) -> None:
        """`steps` are those of agents in earlier attempts; `is_interrupted` asks agents to pause.

        `find_answer` returns the stored answer to the wait at a node and an iteration, None if there is none yet.
        """
        self._steps = steps
        self._find_answer = find_answer
        self._is_interrupted = is_interrupted
        self._program = program
        self._nodes = program.nodes
        self._is_strict = program.graph.settings.strict_mappings
        self._caller = caller
        self._key_prefix = caller.key_prefix
        self._services = services
        self._recorder = recorder

    def build_visit(
        self, frame: SectionFrame, node_id: str, roots: Mapping[str, Json] | None = None
    ) -> NodeVisit:
        """Return a new visit of a node, with its input after mappings and its recorded state from earlier attempts.

        In a thread, `roots` is a snapshot of the frame's roots at the start, since other nodes complete
        meanwhile; None for the frame's own. Raises `ExpressionError`, `InvalidJson`, `NodeError` and, within
        `offload.try_inline`, `BudgetExceeded`.
        """
        program = self._nodes[node_id]
        data, input_node = self._gather_input(frame, program)
        unresolved: list[str] = []
        if program.mappings:
            data, input_node = _apply_mappings(roots or frame.roots, program, data, unresolved), None
        encoded = None if input_node is not None else values.encode_json(data)
        digest = frame.digests[input_node] if input_node is not None else sha256(encoded or b"").digest()
        visit = NodeVisit(
            frame,
            program,
            data,
            input_node,
            encoded,
            digest,
            self._recorder.clock.now(),
            unresolved=unresolved,
        )
        if program.agent is not None:
            self._restore_steps(visit, program.agent)
        recorded = frame.recorded.get(node_id)
        if recorded is not None:
            _resume_visit(visit, recorded)
        elif frame.candidates:
            visit.candidate = frame.candidates.get(node_id)
        return visit

    def _restore_steps(self, visit: NodeVisit, agent: AgentProgram) -> None:
        """Set in the visit of an agent its steps of earlier attempts, with their model calls, and those of a replayed
        run.
        """
        from engine.agents import call_waits  # noqa: PLC0415 - loaded by runs with agents

        place = visit.node_id, visit.frame.iteration
        by_place: dict[tuple[str, str], list[AgentStep]] = {}
        candidates: dict[tuple[str, str], dict[int, AgentStep]] = {}
        for step in self._steps:
            if step.is_candidate:
                candidates.setdefault((step.node_id, step.iteration), {})[step.number] = step
            else:
                by_place.setdefault((step.node_id, step.iteration), []).append(step)
        visit.candidate_steps = candidates
        visit.steps, visit.nested_steps = by_place.pop(place, []), by_place
        visit.model_calls = call_waits.collect_calls(agent, visit.steps, visit.nested_steps)

    def build_failed_visit(self, frame: SectionFrame, node_id: str) -> NodeVisit:
        """Return a visit without input, with which a node is recorded whose input could not be prepared."""
        return NodeVisit(frame, self._nodes[node_id], None, None, None, b"", self._recorder.clock.now())

    def _gather_input(self, frame: SectionFrame, program: NodeProgram) -> tuple[Json, str | None]:
        """Return the input of a node, and the id of the single parent whose unchanged output it is, else None.

        Several parents give a merged object that also has each output by node id; a join combines them as its config
        says. A node without parents gets the input of its frame, or null if the node is pinned. Raises `NodeError` if
        values to merge in a join are no objects.
        """
        edges = frame.plan.taken_edges(program.node.id)
        if not edges:
            return (None if program.is_pinned else frame.given), None
        if program.join is None and len(edges) == 1:
            return _parent_output(frame, edges[0].source)
        parents = list(dict.fromkeys(edge.source for edge in edges))
        if program.join is not None and program.join.mode is JoinMode.ALL:
            outputs = {parent: _parent_output(frame, parent)[0] for parent in parents}
            return program.join.combine_outputs(outputs), None
        if len(parents) == 1:
            return _parent_output(frame, parents[0])
        merged: dict[str, Json] = {}
        for parent in parents:
            output, _ = _parent_output(frame, parent)
            if isinstance(output, dict):
                merged.update(output)
        merged.update({parent: _parent_output(frame, parent)[0] for parent in parents})
        return merged, None

    def build_call(self, visit: NodeVisit, roots: Mapping[str, Json] | None = None) -> NodeCall:
        """Return the call of the node of a visit, after rendering its config.

        Sets the start of the attempt, config, unresolved paths and `hashes` of the visit: the key by which a replay
        recognizes an equal call. A recorded config is used unchanged, with the defaults of later fields. Raises
        `ExpressionError`, `InvalidJson`, `NodeError` for missing configuration or, in a strict graph, unresolved paths,
        and `BudgetExceeded` within `offload.try_inline`. See `build_visit` for `roots`.
        """
        program, frame = visit.program, visit.frame
        visit.begun_at = self._recorder.clock.now()
        if program.missing is not None:
            raise NodeError(f"The node needs configuration: {program.missing}", code="missing-config")
        scope = {"data": visit.data, **(roots or frame.roots)}
        if program.late_nodes and roots is None:
            # Nodes that settle while this one runs must not change what it reads: its key says what that is.
            scope["nodes"] = _select_nodes(frame.nodes, program.late_nodes)
        if visit.resolved_config is not None:
            visit.config = _restore_config(program, visit.resolved_config)
        else:
            visit.config = cast("Mapping[str, Json]", program.config.render(scope, visit.unresolved))
        if visit.unresolved:
            self.check_resolved(visit, scope if visit.hashes is None else None)
        dynamic = visit.input_digest
        if program.is_given_again or not program.config.is_static:
            rendered = visit.resolved_config or values.encode_json(visit.config)
            visit.resolved_config = rendered if program.is_given_again else None
            visit.rendered_config = None if program.is_given_again else rendered
            if program.is_given_again and not program.config.is_static:
                # The node receives exactly the recorded config: `nodes` may grow while that is being
                # committed.
                visit.config = _restore_config(program, rendered)
            dynamic = sha256(dynamic + rendered).digest()
        visit.hashes = program.static_hashes + dynamic + program.key_end
        if program.outside:
            visit.hashes += self._digest_reads(frame, program, scope)
        node_id = program.node.id
        log: Callable[[str, str, str], None] = self._recorder.log
        if not program.records_content:
            log = content_recording.hide_lines(log)
        call = NodeCall(
            config=visit.config,
            data=visit.data,
            scope=scope,
            conditions=program.conditions,
            values=program.values,
            unresolved=visit.unresolved,
            log=lambda level, message: log(level, message, node_id),
            caller=self._caller_of(visit),
            node_id=node_id,
            iteration=frame.iteration,
            idempotency_key=idempotency_key_of(visit.key_id or self._key_prefix, node_id, frame.iteration),
            attempt=visit.attempt,
            now=visit.begun_at,
            services=self._services,
            is_strict=self._is_strict,
            records_content=program.records_content,
            set_metadata=self._recorder.set_metadata,
            model_calls=VisitModelCalls(visit, self._recorder)
            if program.node_type.is_paid
            else NO_MODEL_CALLS,
        )
        if program.agent is None:
            return call
        from engine.agents.tool_calls import VisitSteps, VisitTools  # noqa: PLC0415 - loaded by runs with agents

        steps = VisitSteps(visit, self._recorder, self._is_interrupted, self._find_answer)
        return structs.replace(call, steps=steps, tools=VisitTools(program.agent, call, steps))

    def identify_call(self, visit: NodeVisit) -> dict[str, Any]:
        """Return the values of the fields `caller` and `idempotency_key` for the call of a visit.

        Call it again once `key_id` of the visit is set, which names the earlier execution in both.
        """
        key = idempotency_key_of(visit.key_id or self._key_prefix, visit.node_id, visit.frame.iteration)
        return {"caller": self._caller_of(visit), "idempotency_key": key}

    def _caller_of(self, visit: NodeVisit) -> RunCaller:
        """Return the caller of a visit's run, with the execution id of the visit's idempotency keys.

        It is marked as tainted if text of outsiders may be in the input of the node.
        """
        caller = self._caller
        if visit.key_id is not None:
            caller = structs.replace(caller, write_key_id=visit.key_id)
        if visit.program.has_tainted_input and not caller.is_tainted:
            caller = structs.replace(caller, is_tainted=True)
        return caller

    def _digest_reads(self, frame: SectionFrame, program: NodeProgram, scope: Mapping[str, Json]) -> bytes:
        """Return the digest, for the key of a node, of the values outside `data` that the node can read.

        `UNKNOWN` in an iteration, where a replay reuses no single node, and for a loop whose body may see nodes that
        settle later. Raises `InvalidJson` and `BudgetExceeded`.
        """
        if frame.loop is not None:
            return node_key.UNKNOWN  # a replay never reuses one node of an iteration
        if program.body and any(_is_undecided(frame, path) for path in program.outside):
            return node_key.UNKNOWN  # later iterations may find the value
        return node_key.digest_reads(program.outside, scope)

    def check_resolved(self, visit: NodeVisit, scope: Mapping[str, Json] | None = None) -> None:
        """Remove paths into skipped nodes from the unresolved ones; in a strict graph, raise `NodeError` for
        the others.

        Without a `scope` the node was called: then fields of an item, and paths of conditions, may be missing. With
        one it was not called yet, and only fields of the scope's `item` may be missing.
        """
        if not visit.unresolved:
            return
        visit.unresolved[:] = [path for path in visit.unresolved if not _leads_to_skipped(visit.frame, path)]
        if not self._is_strict:
            return
        asked: set[str] = set()
        if scope is None:
            asked = {path.text for one in visit.program.conditions.values() for path in one.paths}
        may_lack = scope is None or "item" in scope
        lost = [
            path
            for path in dict.fromkeys(visit.unresolved)
            if path not in asked and not (may_lack and _is_field_of_item(path))
        ]
        if lost:
            message = (
                f"Nothing was found at {', '.join(lost)}: if it may be missing, "
                "add a fallback, as in {{ data.name ?? null }}"
            )
            raise NodeError(message, code="unresolved-mapping")


class VisitModelCalls(ModelCallLog):
    """Log of the model calls of one node in the journal of its run."""

    def __init__(self, visit: NodeVisit, recorder: SpanRecorder) -> None:
        self._visit = visit
        self._recorder = recorder

    @property
    def recorded(self) -> Sequence[ModelCallRecord]:
        """Calls in the journal, and those added since."""
        return tuple(self._visit.model_calls)

    def add(self, record: ModelCallRecord) -> None:
        """Add a call to the record of the node, which its next state commits."""
        self._visit.model_calls.append(record)

    def now(self) -> datetime:
        return self._recorder.clock.now()

    async def commit(self) -> None:
        """Make the record of the node durable; waits while the database is unavailable.

        If the lease of the run is lost, it does not return: the runner cancels the node.
        """
        self._recorder.record_node(self._visit, SpanStatus.RUNNING)
        try:
            await self._recorder.commit()
        except LeaseLost:
            # The runner itself has to find out: its next commit is refused too.
            self._recorder.has_uncommitted_write = True
            await asyncio.Event().wait()


def _select_nodes(nodes: Mapping[str, Json], names: Sequence[str]) -> dict[str, Json]:
    """Return a copy of the outputs that a node may read while it runs, by node id; all if it refers to
    `nodes` as a whole.
    """
    if EVERY_NODE in names:
        return dict(nodes)
    return {name: nodes[name] for name in names if name in nodes}


def _is_undecided(frame: SectionFrame, path: ExpressionPath) -> bool:
    """Return whether a path leads into a node that has neither settled nor been skipped."""
    node_id = path.steps[0][0] if path.root == "nodes" and path.steps else None
    return node_id is not None and node_id not in frame.nodes and not frame.is_skipped(node_id)


def _is_field_of_item(path: str) -> bool:
    return path.removeprefix("$.").startswith(("item.", "item["))


def _leads_to_skipped(frame: SectionFrame, text: str) -> bool:
    """Return whether the text of a path leads into a skipped node of a frame; False for a text that is no path."""
    if not text.removeprefix("$.").startswith("nodes"):
        return False
    try:
        path = compile_path(text)
    except ExpressionError:
        return False  # the name of a missing pass-through field
    node_id = path.steps[0][0] if path.root == "nodes" and path.steps else None
    return node_id is not None and frame.is_skipped(node_id)


def _parent_output(frame: SectionFrame, parent: str) -> tuple[Json, str | None]:
    """Return a parent's output and its id.

    If the parent is the enclosing loop, they are the item of the iteration, and None.
    """
    if frame.loop is not None and parent == frame.section.loop_id:
        return frame.given, None
    return frame.outputs[parent], parent


def _apply_mappings(
    roots: Mapping[str, Json], program: NodeProgram, data: Json, unresolved: list[str]
) -> Json:
    """Return the data with the mapped fields added, or these alone if the data is no object.

    Unresolved paths are added to `unresolved`, and their fields are null. Raises `ExpressionError`.
    """
    scope = {"data": data, **roots}
    mapped: dict[str, Json] = {}
    for name, source in program.mappings.items():
        if isinstance(source, ValueTemplate):
            mapped[name] = source.render(scope, unresolved)
            continue
        value = source.resolve(scope)
        if value is MISSING:
            unresolved.append(source.text)
            value = None
        mapped[name] = value
    return {**data, **mapped} if isinstance(data, dict) else mapped


def _restore_config(program: NodeProgram, recorded: bytes) -> Mapping[str, Json]:
    """Return a recorded config, with the defaults of fields that are newer than it; nested objects stay as
    they are.
    """
    return {**program.defaults, **cast("Mapping[str, Json]", values.restore_json(recorded))}


def _resume_visit(visit: NodeVisit, recorded: NodeSpan) -> None:
    """Set the state of a visit, such as attempt, input and config, from the span of an earlier attempt.

    The attempt number stays for a wait, a loop and an agent, which continue; else it is the next one, and a span that
    was running is noted in `visit.lost`. A recorded config and its input are used again, except after a wait.
    """
    visit.started_at = recorded.started_at or visit.started_at
    visit.key_id = recorded.key_id
    if recorded.status is SpanStatus.WAITING:
        visit.attempt, visit.hashes = recorded.attempt, recorded.hashes
        visit.unresolved = list(recorded.unresolved)
        return
    # A resumed loop continues with its items, and an agent with its steps: that is no new attempt.
    continues = visit.program.node_type.loops or visit.program.agent is not None
    visit.attempt = recorded.attempt if continues else recorded.attempt + 1
    if recorded.status is SpanStatus.RUNNING and not continues:
        visit.lost = recorded
    if recorded.model_calls is not None and visit.program.agent is None:
        from engine.model_calls import ModelCallRecord  # noqa: PLC0415 - loaded by runs that call models

        visit.model_calls = decoding.decode(recorded.model_calls, list[ModelCallRecord])
    if recorded.resolved_config is None:
        return
    visit.resolved_config = recorded.resolved_config
    if recorded.input is not None:
        visit.input, visit.data = recorded.input, values.restore_json(recorded.input)
        visit.input_digest = sha256(recorded.input).digest()
