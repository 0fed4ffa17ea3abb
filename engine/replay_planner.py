"""Planner of replays: decides about every node of the definition to run.

The plan is a pure function of the recorded spans, the definition to run, the input, and the data sources as they
are now. Keys (`engine.node_key`) tell whether a result still holds. A node behind one that runs again may turn out
to have the same input: its result is a candidate, which the run itself compares once it knows the input.

Writes are never repeated by guess: a completed write whose key has changed needs a confirmation by its id. A
failed write runs again if its error proves that nothing happened, or if its request is the same, under the same
idempotency key.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, cast

from msgspec.structs import replace

from engine import approval_links, values
from engine.agents.agent_steps import StepReuse
from engine.expressions import ExpressionError
from engine.frames import NO_PORT, SectionFrame
from engine.node_api import NodeEffect
from engine.node_inputs import NodeInputs
from engine.node_key import NodeKey, decode_key
from engine.program import mapping_paths
from engine.replay_changes import (
    changed_body_nodes,
    diff_paths,
    edge_ends,
    find_loops_around,
    static_changes,
)
from engine.replay_plan import (
    NodeReplay,
    ReplayDecision,
    ReplayFacts,
    ReplayOptions,
    ReplayPlan,
    ReplayReason,
    ReplayReasonCode,
    ResultUse,
)
from engine.run_errors import NodeError
from engine.run_limits import RunLimits
from engine.run_records import NodeSpan, SpanStatus
from engine.services import NodeServices
from engine.span_recorder import SpanRecorder
from engine.unfinished_writes import keep_request, may_have_happened, was_refused
from engine.values import InvalidJson

if TYPE_CHECKING:
    from engine.agents.agent_steps import AgentStep
    from engine.expressions import ExpressionPath
    from engine.program import NodeProgram
    from engine.run_records import AttemptSpan, LogLine
    from engine.services import HttpClientService
    from engine.values import Json


def plan_replay(facts: ReplayFacts, options: ReplayOptions) -> ReplayPlan:
    """Return the plan of a replay: for each node whether it is reused, runs again, may run, is left out, or needs a
    confirmation that `options` doesn't give.

    It has no side effects. It takes noticeable time for large outputs, so call it in a thread.
    """
    unknowable: frozenset[str] = frozenset()
    while True:
        planner = _NodePlanner(facts, options, unknowable)
        plan = planner.plan()
        misjudged = planner.find_misjudged()
        if not misjudged:
            return plan
        unknowable |= misjudged


class _NodePlanner:
    """Planner of one pass over the graph: decides about each node."""

    def __init__(
        self, facts: ReplayFacts, options: ReplayOptions, unknowable: frozenset[str] = frozenset()
    ) -> None:
        """`unknowable` are the nodes that `find_misjudged` of earlier passes returned.

        They refer to a parallel branch that runs again, so they are decided like nodes whose input is known only when
        the replay runs.
        """
        self._unknowable = unknowable
        self._presumed: set[str] = set()
        """Nodes that were decided before a parallel branch that they refer to."""
        self._facts = facts
        self._options = options
        self._program = facts.program
        self._graph = facts.program.graph
        self._forced = options.forced | find_loops_around(facts.program, options.forced)
        self._recorded = {span.node_id: span for span in facts.spans if not span.iteration}
        self._decisions: dict[str, NodeReplay] = {}
        self._skipped: set[str] = set()
        self._known: set[str] = set()
        """Nodes with a known output."""
        self._frame = SectionFrame(
            self._program.root, facts.trigger, self._roots(), recorded={}, started_at=facts.started_at
        )
        recorder = SpanRecorder(_NoJournal(), 0, RunLimits(), facts.clock)
        self._inputs = NodeInputs(
            self._program, facts.caller, NodeServices(http=cast("HttpClientService", None)), recorder
        )

    def _roots(self) -> dict[str, Json]:
        caller, started_at = self._facts.caller, self._facts.started_at
        return {
            "approval": approval_links.build_root(self._program.graph.nodes),
            "trigger": self._facts.trigger,
            "execution": {
                "id": caller.execution_id,
                "workflowId": caller.workflow_id,
                "startedAt": started_at.isoformat().replace("+00:00", "Z"),
            },
        }

    def plan(self) -> ReplayPlan:
        """Decide about all nodes; return the decisions in the order of the graph, and the recorded nodes that
        it no longer has.
        """
        self._decide_reachable()
        self._show_skipped()
        for node_id in self._graph.order:
            if node_id in self._frame.section.graph.by_id and node_id not in self._decisions | dict.fromkeys(
                self._skipped
            ):
                self._decisions[node_id] = self._decide_behind(node_id)
        for loop_id, loop in list(self._decisions.items()):
            self._decide_body(loop_id, loop)
        ordered = [node.id for node in self._graph.nodes if node.id in self._decisions]
        removed = [node_id for node_id in self._recorded if node_id not in self._graph.by_id]
        decided = [self._apply_confirmation(self._decisions[node_id]) for node_id in ordered]
        nodes = tuple(self._reuse_answers(node) for node in decided)
        return ReplayPlan(nodes, tuple(removed))

    # ── nodes with known inputs ───────────────────────────────────────────────────────────────────

    def _decide_reachable(self) -> None:
        """Decide about every node whose inputs are all known, in the order in which they settled in the run.

        Nodes behind one that runs again are left undecided.
        """
        change = self._frame.start()
        ready = list(change.ready)
        self._skip(change.skipped)
        while ready:
            ready.sort(key=self._sequence)
            able = [one for one in ready if one not in self._unknowable]
            chosen = next((one for one in able if not self._open_references(one)), None)
            if chosen is None:
                # Parallel branches refer to each other, as by `{{ nodes }}`: the end shows whether that was right.
                chosen = next(
                    (one for one in able if self._decisions.keys().isdisjoint(self._open_references(one))),
                    None,
                )
                if chosen is None:
                    return
                self._presumed.add(chosen)
            ready.remove(chosen)
            decision = self._decide(chosen)
            self._decisions[chosen] = decision
            port = self._known_port(chosen, decision)
            if port is not None:
                self._known.add(chosen)
            elif decision.decision is ReplayDecision.SKIP:
                self._skip([chosen])
                port = NO_PORT
            if port is not None:
                change = self._frame.plan.settle(chosen, port)
                ready += [one for one in change.ready if one not in ready]
                self._skip(change.skipped)

    def _show_skipped(self) -> None:
        """Add decisions about nodes that are skipped because a write before them is left out, so that the plan shows
        them.
        """
        for node_id in self._graph.order:
            if node_id in self._skipped and node_id not in self._decisions and self._left_out_before(node_id):
                self._decisions[node_id] = self._skip_behind(node_id)

    def _left_out_before(self, node_id: str) -> list[str]:
        """Return the direct predecessors of a node that the plan skips."""
        before = dict.fromkeys(edge.source for edge in self._graph.inbound[node_id])
        return [
            other
            for other in before
            if other in self._decisions and self._decisions[other].decision is ReplayDecision.SKIP
        ]

    def _skip_behind(self, node_id: str) -> NodeReplay:
        """Return the decision to skip a node behind a write that is left out; its own earlier write stays recorded."""
        reason = ReplayReason(ReplayReasonCode.UPSTREAM_LEFT_OUT, tuple(self._left_out_before(node_id)))
        span = self._recorded.get(node_id)
        has_written = (
            span is not None and self._program.nodes[node_id].is_write and keep_request(span)[0] is not None
        )
        use = ResultUse.LEFT_OUT if has_written else ResultUse.NONE
        return self._make(node_id, ReplayDecision.SKIP, [reason], use)

    def _leave_out(self, node_id: str, span: NodeSpan | None) -> NodeReplay:
        """Return the decision about a write that the caller wants to leave out: its result is reused.

        Without a result, or if that has expired, it is skipped.
        """
        reason = ReplayReason(ReplayReasonCode.LEFT_OUT)
        has_result = span is not None and span.port is not None and node_id not in self._facts.expired
        if has_result:
            return self._make(node_id, ReplayDecision.REUSE, [reason], ResultUse.SETTLED)
        return self._make(node_id, ReplayDecision.SKIP, [reason], ResultUse.LEFT_OUT)

    def _skip(self, node_ids: Iterable[str]) -> None:
        self._skipped.update(node_ids)
        self._frame.skipped.update(node_ids)

    def _sequence(self, node_id: str) -> int:
        span = self._recorded.get(node_id)
        return span.sequence if span is not None else 2**31

    def find_misjudged(self) -> frozenset[str]:
        """Return the nodes whose results were reused although a parallel branch that they refer to runs again.

        The plan must be made again with these nodes as `unknowable`.
        """
        return frozenset(
            node_id for node_id in self._presumed if node_id in self._known and self._open_references(node_id)
        )

    def _open_references(self, node_id: str) -> set[str]:
        """Return the nodes that a node refers to and whose output is not known yet, except those that follow it."""
        found = {
            other
            for other in self._references(node_id)
            if other not in self._known and other not in self._skipped
        }
        return found - self._followers(node_id) if found else found

    def _references(self, node_id: str) -> set[str]:
        """Return the other nodes outside of loops that the expressions of a node refer to; all for `nodes` alone."""
        program = self._program.nodes[node_id]
        section = self._frame.section.graph.by_id
        found: set[str] = set()
        for path in _all_paths(program):
            if path.root == "nodes":
                named = path.steps[0][0] if path.steps else None
                found |= {named} if named is not None else set(section)
        return {other for other in found if other in section and other != node_id}

    def _followers(self, node_id: str) -> set[str]:
        """Return all nodes behind a node."""
        found: set[str] = set()
        left = deque([node_id])
        while left:
            for edge in self._graph.outbound[left.popleft()]:
                if edge.target not in found:
                    found.add(edge.target)
                    left.append(edge.target)
        return found

    def _known_port(self, node_id: str, decision: NodeReplay) -> str | None:
        """Return the port by which a node leaves if its result is known before the replay runs, else None.

        A reused result is known, and so is the output of a trigger that runs again. The output and its digest are
        stored in the frame.
        """
        span = self._recorded.get(node_id)
        if decision.use is ResultUse.SETTLED and span is not None and span.port is not None:
            output = span.output or b"null"
            self._frame.outputs[node_id] = values.restore_json(output) if self._facts.has_outputs else None
            self._frame.digests[node_id] = sha256(span.output or b"").digest()
            return span.port
        program = self._program.nodes[node_id]
        if (
            program.node_type.is_trigger
            and not program.is_pinned
            and decision.decision is ReplayDecision.RERUN
        ):
            text = values.encode_json(self._facts.trigger)
            self._frame.outputs[node_id] = self._facts.trigger
            self._frame.digests[node_id] = sha256(text).digest()
            return "output"
        return None

    def _decide(self, node_id: str) -> NodeReplay:
        """Return the decision about a node with known inputs.

        A result whose key still holds is reused, unless the caller forces or refreshes the node. Otherwise the node
        runs, a completed write only after a confirmation.
        """
        span, program = self._recorded.get(node_id), self._program.nodes[node_id]
        if node_id in self._options.left_out:
            return self._leave_out(node_id, span)
        if span is None:
            return self._decide_unrecorded(node_id)
        if span.port is None:
            return self._decide_unfinished(node_id, span)
        key = decode_key(span.hashes)
        if node_id in self._forced:
            forced = [ReplayReason(ReplayReasonCode.FORCED)]
            if program.body and self._options.failed_only:
                return self._decide_failed_loop(node_id, span, forced)
            return self._repeat(node_id, forced, key)
        if key is None:
            return self._repeat(node_id, [ReplayReason(ReplayReasonCode.NO_RESULT)], None)
        if node_id in self._facts.expired:
            return self._repeat(node_id, [ReplayReason(ReplayReasonCode.RESULT_EXPIRED)], key)
        reasons = static_changes(self._facts, node_id, key)
        dynamic = self._dynamic_changes(node_id, span, key)
        if reasons or dynamic:
            return self._repeat(node_id, [*reasons, *dynamic], key)
        if self._is_refreshed(program):
            return self._run(node_id, ReplayReason(ReplayReasonCode.REFRESHED))
        return self._make(
            node_id, ReplayDecision.REUSE, [ReplayReason(ReplayReasonCode.UNCHANGED)], ResultUse.SETTLED
        )

    def _is_refreshed(self, program: NodeProgram) -> bool:
        """Return whether the caller wants nodes that read to run again, and this node or one in its body reads."""
        nodes = (program, *(self._program.nodes[inner] for inner in program.body))
        return self._options.refreshes_reads and any(
            _determine_effect(one) is NodeEffect.READ for one in nodes
        )

    def _decide_unrecorded(self, node_id: str) -> NodeReplay:
        """Return the decision about a node without a span outside of loops: it runs.

        A write that the recorded run may have done in a loop needs a confirmation.
        """
        was_written = node_id in self._facts.written_in_loops
        if was_written and self._program.nodes[node_id].is_write:
            return self._ask(node_id, [self._absence(node_id)], ResultUse.NONE)
        return self._run(node_id, self._absence(node_id))

    def _absence(self, node_id: str) -> ReplayReason:
        known = node_id in self._facts.original.by_id
        return ReplayReason(ReplayReasonCode.NO_RESULT if known else ReplayReasonCode.NEW_NODE)

    def _decide_unfinished(self, node_id: str, span: NodeSpan) -> NodeReplay:
        """Decide about a node with known inputs that failed or did not end in the run: it runs again.

        A write that may have happened is different: the same request is repeated under its key, unless the node is
        forced or runs at most once; in all other cases it needs a confirmation.
        """
        program = self._program.nodes[node_id]
        reasons = [self._failure(span)]
        if node_id in self._forced:
            reasons.insert(0, ReplayReason(ReplayReasonCode.FORCED))
        if program.body:
            return self._decide_failed_loop(node_id, span, reasons)
        if not program.is_write or not may_have_happened(span):
            return self._run(node_id, *reasons)
        if was_refused(span):
            return self._ask(node_id, reasons, ResultUse.NONE)
        key = decode_key(span.hashes)
        changes = [] if key is None else static_changes(self._facts, node_id, key)
        if key is not None and not changes:
            changes = self._dynamic_changes(node_id, span, key)
        is_same = key is not None and not changes and not program.node.at_most_once
        if is_same and node_id not in self._forced:
            return self._make(node_id, ReplayDecision.RERUN, reasons, ResultUse.IN_FLIGHT)
        return self._ask(node_id, [*reasons, *changes], ResultUse.NONE)

    def _decide_failed_loop(self, node_id: str, span: NodeSpan, reasons: list[ReplayReason]) -> NodeReplay:
        """Return the decision that a loop with known inputs runs again: from its completed iterations, if they still
        hold.

        They hold if nothing that they depend on has changed; with the option `failed_only`, changes of the body don't
        count.
        """
        key = decode_key(span.hashes)
        if key is None:
            return self._run(node_id, *reasons)
        changes = static_changes(self._facts, node_id, key)
        own = [] if self._options.failed_only else changes
        if self._options.failed_only:
            own = [reason for reason in changes if not self._is_about_body(reason)]
        if not own and not self._dynamic_changes(node_id, span, key, ignores_body=self._options.failed_only):
            decision = self._make(node_id, ReplayDecision.RERUN, [*reasons, *changes], ResultUse.ITERATIONS)
            return replace(decision, failed_only=True)
        return self._run(node_id, *reasons, *changes)

    def _is_about_body(self, reason: ReplayReason) -> bool:
        return reason.code is ReplayReasonCode.CONFIG_CHANGED and all(
            path.startswith("nodes.") for path in reason.paths
        )

    # ── nodes behind others that run ──────────────────────────────────────────────────────────────

    def _decide_behind(self, node_id: str) -> NodeReplay:
        """Decide about a node whose input is known only when the replay runs, since a node before it runs again.

        A result that may still fit is kept as a candidate; a write behind a changed node needs a
        confirmation.
        """
        span = self._recorded.get(node_id)
        if node_id in self._options.left_out:
            return self._leave_out(node_id, span)
        skipped = self._left_out_before(node_id)
        if skipped and {edge.source for edge in self._graph.inbound[node_id]} <= {*skipped, *self._skipped}:
            return self._skip_behind(node_id)
        return (
            self._decide_unrecorded(node_id) if span is None else self._decide_recorded_behind(node_id, span)
        )

    def _decide_recorded_behind(self, node_id: str, span: NodeSpan) -> NodeReplay:
        """Decide about a node with a recorded span, whose input is known only when the replay runs.

        Its result becomes a candidate unless it surely no longer holds; a write whose input may change needs a
        confirmation.
        """
        program = self._program.nodes[node_id]
        # A skipped write with a request was left out of a replay, and may have happened before it.
        if span.status is SpanStatus.SKIPPED and span.resolved_config is None:
            has_written = bool(self._written_in(program))
            decision = ReplayDecision.RERUN if has_written else ReplayDecision.MAYBE
            return self._run(node_id, ReplayReason(ReplayReasonCode.NO_RESULT), decision=decision)
        is_forced = node_id in self._forced
        key = decode_key(span.hashes)
        if span.port is None:
            return self._decide_unfinished_behind(node_id, span, key)
        if is_forced:
            return self._repeat(node_id, [ReplayReason(ReplayReasonCode.FORCED)], key)
        if key is None:
            return self._repeat(node_id, [ReplayReason(ReplayReasonCode.NO_RESULT)], None)
        if node_id in self._facts.expired:
            return self._repeat(node_id, [ReplayReason(ReplayReasonCode.RESULT_EXPIRED)], key)
        changes = static_changes(self._facts, node_id, key)
        if changes:
            return self._repeat(node_id, changes, None)
        if self._is_refreshed(program):
            return self._run(node_id, ReplayReason(ReplayReasonCode.REFRESHED))
        behind = self._reruns_before(node_id)
        reason = ReplayReason(ReplayReasonCode.UPSTREAM_MAYBE, tuple(sorted(behind)))
        if program.is_write and behind:
            return self._ask(node_id, [reason], ResultUse.CANDIDATE)
        is_guarded = self._is_guarded(program)
        use = ResultUse.UNCONFIRMED if is_guarded else ResultUse.CANDIDATE
        return self._make(node_id, ReplayDecision.MAYBE, [reason], use)

    def _decide_unfinished_behind(self, node_id: str, span: NodeSpan, key: NodeKey | None) -> NodeReplay:
        """Decide about a node without a result, whose input is known only when the replay runs: it runs again.

        A write that may have happened runs only with its recorded request, or after a confirmation.
        """
        program = self._program.nodes[node_id]
        reasons = [self._failure(span)]
        if not program.is_write or not may_have_happened(span):
            return self._run(node_id, *reasons)
        if was_refused(span):
            return self._ask(node_id, reasons, ResultUse.NONE)
        changes = [] if key is None else static_changes(self._facts, node_id, key)
        if key is None or changes or program.node.at_most_once or node_id in self._forced:
            return self._ask(node_id, [*reasons, *changes], ResultUse.NONE)
        reasons.append(ReplayReason(ReplayReasonCode.UPSTREAM_MAYBE))
        is_guarded = node_id not in self._options.confirmed
        use = ResultUse.UNCONFIRMED if is_guarded else ResultUse.CANDIDATE
        return self._make(node_id, ReplayDecision.MAYBE, reasons, use)

    def _reruns_before(self, node_id: str) -> set[str]:
        """Return the nodes that surely run again and whose output a node takes or refers to."""
        before = {edge.source for edge in self._graph.inbound[node_id]} | self._references(node_id)
        return {
            other
            for other in before
            if (found := self._decisions.get(other)) is not None
            and found.decision in {ReplayDecision.RERUN, ReplayDecision.ASK}
            and other not in self._known
        }

    def _is_guarded(self, program: NodeProgram) -> bool:
        """Return whether a run of the node would repeat an unconfirmed write, its own or one in its body."""
        confirmed = self._options.confirmed
        if program.is_write:
            return program.node.id not in confirmed
        return any(inner not in confirmed for inner in self._written_in(program))

    def _written_in(self, loop: NodeProgram) -> list[str]:
        return [
            inner
            for inner in sorted(loop.body & self._facts.written_in_loops)
            if self._program.nodes[inner].is_write
        ]

    # ── bodies of loops ───────────────────────────────────────────────────────────────────────────

    def _decide_body(self, loop_id: str, loop: NodeReplay) -> None:
        """Decide about the nodes in the body of a loop as about the loop; repeated writes need a confirmation."""
        program = self._program.nodes[loop_id]
        facts = self._facts
        changed = (
            changed_body_nodes(program, facts.original, self._graph, facts.rewired_agents)
            | facts.written_in_earlier_loops
            if loop.failed_only
            else frozenset(program.body)
        )
        found = facts.written_in_failed_iterations if loop.failed_only else facts.written_in_loops
        written = {
            inner
            for inner in program.body
            if self._program.nodes[inner].is_write and (inner in found or self._was_written(inner))
        }
        for inner in sorted(program.body):
            decision, reasons = loop.decision, loop.reasons
            if loop.decision in {ReplayDecision.RERUN, ReplayDecision.ASK}:
                repeats = inner in written and inner in changed
                decision = ReplayDecision.ASK if repeats else ReplayDecision.RERUN
                needs = (ReplayReason(ReplayReasonCode.WRITE_NEEDS_CONFIRM),)
                reasons = (*reasons, *needs) if repeats else reasons
            effect = _determine_effect(self._program.nodes[inner])
            self._decisions[inner] = NodeReplay(inner, decision, effect, reasons)

    def _was_written(self, inner: str) -> bool:
        """Return whether a node, which is in a loop now, may have written outside of loops in the recorded run."""
        span = self._recorded.get(inner)
        return span is not None and (span.status is SpanStatus.COMPLETED or may_have_happened(span))

    # ── comparison of keys ────────────────────────────────────────────────────────────────────────

    def _dynamic_changes(
        self, node_id: str, span: NodeSpan, key: NodeKey, *, ignores_body: bool = False
    ) -> list[ReplayReason]:
        """Return the reasons for which the values that a node reads have changed; empty if they are the same.

        All its predecessors must be decided. If the outputs aren't at hand, a doubt counts as a change. With
        `ignores_body`, only the input is compared, not the values that the body of a loop reads.
        """
        if self._has_same_values(node_id):
            return []
        lost = [edge.source for edge in self._facts.original.inbound.get(node_id, ())]
        removed = tuple(source for source in lost if source not in self._graph.by_id)
        gone = [ReplayReason(ReplayReasonCode.REMOVED_NODE, removed)] if removed else []
        changed = [*gone, ReplayReason(ReplayReasonCode.INPUT_CHANGED)]
        if not self._facts.has_outputs or self._reads_execution(node_id):
            return changed
        try:
            visit = self._inputs.build_visit(self._frame, node_id)
            self._inputs.build_call(visit)
        except (ExpressionError, InvalidJson, NodeError):
            return changed
        now = decode_key(visit.hashes)
        if now is None:
            return changed
        if now.input == key.input and (now.reads == key.reads or ignores_body):
            return []
        paths = diff_paths(self._recorded_input(span), visit.data, "data")
        return [*gone, ReplayReason(ReplayReasonCode.INPUT_CHANGED, tuple(paths))]

    def _has_same_values(self, node_id: str) -> bool:
        """Return whether a node surely gets the recorded values: the same sources, all of which reuse their
        results.
        """
        program = self._program.nodes[node_id]
        paths = list(_all_paths(program))
        is_first = not self._graph.inbound[node_id] and not program.is_pinned
        if self._facts.has_new_input and (is_first or any(path.root == "trigger" for path in paths)):
            return False
        edges = self._graph.inbound[node_id]
        earlier = self._facts.original.inbound.get(node_id, ())
        if not program.is_pinned and [edge_ends(edge) for edge in edges] != [
            edge_ends(edge) for edge in earlier
        ]:
            return False
        before = {edge.source for edge in self._frame.plan.taken_edges(node_id)} | self._references(node_id)
        is_presumed = node_id in self._presumed
        return all(
            self._is_as_recorded(other) or (is_presumed and other not in self._decisions) for other in before
        )

    def _is_as_recorded(self, other: str) -> bool:
        found = self._decisions.get(other)
        if found is not None:
            return found.use is ResultUse.SETTLED
        span = self._recorded.get(other)
        was_skipped = span is None or span.status is SpanStatus.SKIPPED
        return other not in self._skipped or was_skipped

    def _reads_execution(self, node_id: str) -> bool:
        return any(path.root == "execution" for path in _all_paths(self._program.nodes[node_id]))

    def _recorded_input(self, span: NodeSpan) -> Json:
        source = None if span.input_node is None else self._recorded.get(span.input_node)
        text = span.input if span.input is not None else (source.output if source else None)
        return None if text is None else values.restore_json(text)

    # ── decisions ─────────────────────────────────────────────────────────────────────────────────

    def _repeat(self, node_id: str, reasons: list[ReplayReason], key: NodeKey | None) -> NodeReplay:
        """Return the decision to run a completed node again; a write needs a confirmation first.

        The result of a write stays a candidate if it has a `key` and the node isn't forced.
        """
        if not self._program.nodes[node_id].is_write:
            return self._run(node_id, *reasons)
        is_forced = any(reason.code is ReplayReasonCode.FORCED for reason in reasons)
        return self._ask(
            node_id, reasons, ResultUse.NONE if is_forced or key is None else ResultUse.CANDIDATE
        )

    def _run(
        self, node_id: str, *reasons: ReplayReason, decision: ReplayDecision = ReplayDecision.RERUN
    ) -> NodeReplay:
        """Return the decision that a node runs, with nothing of its recorded span."""
        return self._make(node_id, decision, reasons, ResultUse.NONE)

    def _ask(self, node_id: str, reasons: Sequence[ReplayReason], use: ResultUse) -> NodeReplay:
        """Return the decision that a write needs a confirmation."""
        needs = ReplayReason(ReplayReasonCode.WRITE_NEEDS_CONFIRM)
        return self._make(node_id, ReplayDecision.ASK, [*reasons, needs], use)

    def _make(
        self, node_id: str, decision: ReplayDecision, reasons: Sequence[ReplayReason], use: ResultUse
    ) -> NodeReplay:
        """Return a decision about a node, with its effect and recorded duration."""
        span = self._recorded.get(node_id)
        seconds = 0.0
        if span is not None and span.started_at is not None and span.ended_at is not None:
            seconds = max((span.ended_at - span.started_at).total_seconds(), 0.0)
        effect = _determine_effect(self._program.nodes[node_id])
        return NodeReplay(node_id, decision, effect, tuple(reasons), use, seconds=seconds)

    def _apply_confirmation(self, node: NodeReplay) -> NodeReplay:
        if node.decision is not ReplayDecision.ASK or node.node_id not in self._options.confirmed:
            return node
        return replace(node, decision=ReplayDecision.RERUN, confirmed=True)

    def _reuse_answers(self, node: NodeReplay) -> NodeReplay:
        """Return the decision about a node; about an agent that runs, with the number and use of its recorded answers.

        They are binding where the plan shows no difference. A forced or refreshed agent begins a new conversation, and
        so does an agent whose answers are not recorded, which is added to the reasons.
        """
        recorded = self._facts.answers.get(node.node_id)
        if recorded is None or node.decision not in {ReplayDecision.RERUN, ReplayDecision.MAYBE}:
            return node
        codes = {reason.code for reason in node.reasons}
        is_refreshed = self._options.refreshes_reads and node.effect is NodeEffect.READ
        if is_refreshed or codes & {ReplayReasonCode.FORCED, ReplayReasonCode.REFRESHED}:
            return node
        if recorded.has_unrecorded_contents or not self._program.nodes[node.node_id].records_content:
            return replace(node, reasons=(*node.reasons, ReplayReason(ReplayReasonCode.CONTENT_NOT_RECORDED)))
        around = find_loops_around(self._program, frozenset({node.node_id}))
        keeps_iterations = any(self._decisions[loop].failed_only for loop in around)
        answers = recorded.unfinished if keeps_iterations else recorded.total
        if not answers:
            return node
        if node.confirmed:
            reuse = StepReuse.CANDIDATE
        elif self._options.refreshes_models or self._may_ask_otherwise(node, around):
            reuse = StepReuse.GUARDED
        else:
            reuse = StepReuse.BINDING
        return replace(node, answers=answers, answer_reuse=reuse)

    def _may_ask_otherwise(self, node: NodeReplay, around: frozenset[str]) -> bool:
        """Return whether an agent may make other requests than the recorded ones, as far as the plan tells.

        `around` are the loops that contain the agent.
        """
        node_id, facts = node.node_id, self._facts
        failures = {ReplayReasonCode.FAILED, ReplayReasonCode.NO_RESULT}
        if any(reason.code not in failures for reason in node.reasons):
            return True
        before = {edge.source for edge in self._graph.inbound[node_id]} | self._references(node_id)
        undecided = (self._decisions.get(other) for other in before - self._known)
        if any(other is not None and other.decision is not ReplayDecision.REUSE for other in undecided):
            return True
        if around:
            loops = (self._program.nodes[loop] for loop in around)
            changed = (
                changed_body_nodes(loop, facts.original, self._graph, facts.rewired_agents) for loop in loops
            )
            return any(node_id in nodes for nodes in changed)
        span = self._recorded.get(node_id)
        key = None if span is None else decode_key(span.hashes)
        if span is None or key is None:
            return True
        return bool(static_changes(facts, node_id, key) or self._dynamic_changes(node_id, span, key))

    def _failure(self, span: NodeSpan) -> ReplayReason:
        """Return the reason of an unfinished node: it failed, or has no result."""
        has_failed = span.status is SpanStatus.FAILED
        return ReplayReason(ReplayReasonCode.FAILED if has_failed else ReplayReasonCode.NO_RESULT)


def _determine_effect(program: NodeProgram) -> NodeEffect:
    if program.is_write:
        return NodeEffect.WRITE
    is_read = program.is_volatile or program.effect is NodeEffect.READ
    return NodeEffect.READ if is_read else NodeEffect.PURE


def _all_paths(program: NodeProgram) -> Iterable[ExpressionPath]:
    yield from program.outside
    yield from program.config.paths
    yield from mapping_paths(program)


class _NoJournal:
    """Journal of a run that does not take place."""

    def record(self, span: NodeSpan) -> None: ...
    def record_attempt(self, attempt: AttemptSpan) -> None: ...
    def record_step(self, step: AgentStep) -> None: ...
    def log(self, line: LogLine) -> None: ...
    def advance(self, share: float) -> None: ...
    def set_metadata(self, metadata: Mapping[str, str]) -> None: ...
    async def commit(self) -> None: ...

    def holds_lease(self) -> bool:
        return True
