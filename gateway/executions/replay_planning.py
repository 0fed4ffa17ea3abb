"""Plans of replays: the recorded run, the definition to run, and the decision about each node."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, NoReturn

from msgspec import Struct, field, structs
from sqlalchemy import and_, case, func, or_, select
from sqlalchemy.orm import aliased
from sqlmodel import col

from engine import name_suggestions
from engine.agents import agent_wiring
from engine.agents.agent_steps import StepKind, StepStatus
from engine.graph import ParsedGraph, RunSettings
from engine.node_api import CONTINUE
from engine.node_key import decode_key
from engine.program import WorkflowProgram
from engine.replay_changes import changed_body_nodes
from engine.replay_plan import (
    RecordedAnswers,
    ReplayFacts,
    ReplayOptions,
    ReplayPlan,
    ReplayReasonCode,
    ResultUse,
)
from engine.replay_planner import plan_replay
from engine.run_errors import InvalidDefinition
from engine.run_records import NodeSpan, SpanStatus
from engine.services import RunCaller
from engine.triggers import trigger_output
from engine.unfinished_writes import keep_request, may_have_happened
from engine.values import encode_canonical, encode_json, fingerprint
from gateway.executions import resume_runs
from gateway.http import errors
from gateway.workflows import graph_shapes, stored_workflow, version_rows
from journal import concurrency_limits, definition_snapshot, run_copies
from journal.blobs.blob_reference import BlobReference, InvalidBlobReference
from journal.blobs.blob_storage import BlobLost, BlobOwner, BlobsUnavailable
from journal.blobs.large_values import LargeValues, RecordedValueLost
from journal.run_copies import ReplayCopy, SkippedNode
from journal.run_rows import decode_error
from journal.waits import completion
from json_text import decoding
from models.agent_step import AgentStepRow
from models.data_source import DataSource
from models.execution import Execution, ExecutionData, SpanRow
from models.execution_visibility import visibility_condition
from models.workflow import Definition, Workflow
from nodes import custom_types

if TYPE_CHECKING:
    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.agents.agent_steps import StepReuse
    from engine.node_api import NodeCall
    from engine.program import AgentProgram
    from engine.run_clock import RunClock
    from engine.values import Json
    from execution.organization_catalogs import OrganizationCatalogs
    from gateway.workflows.workflow_cache import WorkflowCache
    from journal.blobs.blob_store import RunBlobs
    from journal.definition_snapshot import LoadedWorkflow
    from journal.store import ExecutionKey
    from models.access import ApiCaller
    from models.database import Database
    from nodes.catalog import NodeCatalog

ORIGINAL: Final = "original"
CURRENT: Final = "current"
MAX_KEPT_NODES: Final = 5_000
"""Capacity of the cache of compiled definitions, in nodes."""
MAX_LINEAGE: Final = 100
"""Number of replays and resumes before an execution in which its earlier writes are looked for."""
_REQUEST: Final = b"{}"
"""Stands for a recorded request, which a plan does not read."""


class ReplayChoice(Struct, frozen=True):
    """Choices of a caller who replays an execution."""

    definition: str | int = ORIGINAL
    """`original`, `current`, or the number of a version."""
    input: Mapping[str, Json] | None = None
    """Inputs of the trigger; None: those of the execution."""
    forced: frozenset[str] = frozenset()
    refreshes_reads: bool = False
    refreshes_models: bool = False
    confirmed: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()
    failed_only: bool = False


class ChosenDefinition(Struct, frozen=True):
    """Definition that a replay runs."""

    label: str
    """`original`, `current`, or `version 3`."""
    text: str | None
    """Its JSON text; None if it is stored already."""
    hash: str
    content: Mapping[str, Any]
    settings: Mapping[str, Json]
    config: str | None
    """Settings as JSON text; None: those of the execution."""


class RecordedExecution(Struct, frozen=True):
    """Ended execution as its rows describe it."""

    key: ExecutionKey
    row: Row[Any]
    definition_text: str
    spans: Sequence[NodeSpan]
    written_in_loops: frozenset[str]
    written_in_failed_iterations: frozenset[str]
    written_in_earlier_loops: frozenset[str]
    """Nodes that may have written in iterations of replayed executions alone, of which the execution has no spans."""
    revisions: Mapping[str, int]
    answers: Mapping[str, RecordedAnswers]


class PlannedReplay(Struct, frozen=True):
    """Plan of a replay with everything that its run needs."""

    execution_id: str
    workflow_id: str
    definition: ChosenDefinition
    plan: ReplayPlan
    hash: str
    trigger: str | None
    """New output of the trigger as JSON text; None: that of the execution."""
    trigger_type: str
    concurrency_key: str | None
    concurrency_limit: int | None
    total_nodes: int
    dirty: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Changed nodes in the bodies of loops that keep iterations, by loop."""
    bodies: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Nodes in the bodies of these loops."""
    steps: Mapping[str, StepReuse] = field(default_factory=dict)
    """Use of the recorded steps of agents, by their node ids and those of the tools that are agents."""
    has_outside_trigger: bool = False
    """Whether the trigger of the recorded definition, whose output the replay has, may hold text of outsiders."""
    left_out: Mapping[str, SkippedNode] = field(default_factory=dict)
    """Nodes that the replay begins with as skipped, by their ids."""
    writes: frozenset[str] = frozenset()
    """Nodes that a replay may leave out: writes outside of loops, and loops that write."""


class ReplayPlanner:
    """Planner of replays for one gateway."""

    def __init__(
        self,
        database: Database,
        clock: RunClock,
        workflows: WorkflowCache,
        catalogs: OrganizationCatalogs,
        blobs: RunBlobs,
    ) -> None:
        self._database = database
        self._clock = clock
        self._workflows = workflows
        self._catalogs = catalogs
        self._compiled = _CompiledDefinitions(catalogs.base)
        self._blobs = blobs

    async def plan(self, key: ExecutionKey, caller: ApiCaller, choice: ReplayChoice) -> PlannedReplay:
        """Return the plan of a replay: for each node, whether its recorded result is reused; nothing is stored.

        Recorded values are loaded only if an input may have changed, or a new concurrency key depends on the trigger.
        Writes that need a confirmation raise nothing: they are `unconfirmed` in the plan. Raises 404, 409 for an
        execution that has not ended, 422 for unknown nodes, wrong choices and invalid definitions, and 503 while the
        blob storage is unavailable.
        """
        async with self._database.read() as connection:
            recorded = await _read_execution(connection, key, caller)
            chosen = await self._choose_definition(connection, recorded, caller, choice)
        options = ReplayOptions(
            forced=choice.forced,
            refreshes_reads=choice.refreshes_reads,
            refreshes_models=choice.refreshes_models,
            confirmed=choice.confirmed,
            left_out=choice.left_out,
            failed_only=choice.failed_only,
        )
        trigger = None
        if choice.input is not None:
            kind = recorded.row.trigger_type
            found = definition_snapshot.find_trigger(chosen.content["nodes"], self._catalogs.base)
            trigger = trigger_output(found.kind if found else kind, choice.input, self._clock.now())
        plan = _Planning(recorded, chosen, choice, options, trigger, self._compiled, self._clock)
        planned = await asyncio.to_thread(plan.make)
        if plan.has_expirable and (expired := await self._find_expired(recorded)):
            plan.expired = expired
            planned = await asyncio.to_thread(plan.make)
        if any(
            reason.code is ReplayReasonCode.INPUT_CHANGED for node in planned.nodes for reason in node.reasons
        ):
            # Only now the values themselves matter.
            await self._load_values(plan)
            planned = await asyncio.to_thread(plan.make)
        if plan.needs_trigger:
            await self._load_values(plan)
        return plan.complete(planned)

    async def _choose_definition(
        self,
        connection: AsyncConnection,
        recorded: RecordedExecution,
        caller: ApiCaller,
        choice: ReplayChoice,
    ) -> ChosenDefinition:
        """Return the definition that the choice names: of the recorded run, of the workflow as it is now, or of a
        version.

        Raises a 404 error for a workflow that the caller may not read, and 422 for an invalid graph or an unknown
        version.
        """
        row = recorded.row
        if choice.definition == ORIGINAL:
            content = decoding.decode(recorded.definition_text)
            return ChosenDefinition(
                ORIGINAL, None, row.definition_hash, content, content.get("settings") or {}, None
            )
        workflow = await self._workflows.load(row.workflow_id, caller)
        if choice.definition == CURRENT:
            revision = await connection.scalar(
                select(col(Workflow.revision)).where(col(Workflow.id) == workflow.id)
            )
            if revision != workflow.revision:
                self._workflows.forget(workflow.organization_id, workflow.id)
                workflow = await self._workflows.load(workflow.id, caller)
            graph_shapes.require_valid(workflow.validation)
            content = decoding.decode(workflow.definition)
            return ChosenDefinition(
                CURRENT,
                workflow.definition,
                workflow.definition_hash,
                content,
                workflow.settings,
                workflow.config,
            )
        return await self._choose_version(connection, workflow, int(choice.definition))

    async def _choose_version(
        self, connection: AsyncConnection, workflow: LoadedWorkflow, number: int
    ) -> ChosenDefinition:
        """Return the definition of a version of a workflow; raises a 422 error if there is none, or its graph
        is invalid now.
        """
        version = await version_rows.find_version(connection, workflow.id, number)
        if version is None:
            message = f"The workflow has no version {number}"
            raise errors.invalid([errors.problem("definition", "unknown-version", message)])
        snapshot = stored_workflow.move_foreign_settings(version.snapshot)
        catalog = await self._catalogs.read(connection, workflow.organization_id)
        content = definition_snapshot.build_definition(
            snapshot["nodes"], snapshot["connections"], snapshot["settings"], catalog
        )
        validation = await asyncio.to_thread(
            definition_snapshot.check_graph, snapshot["nodes"], snapshot["connections"], catalog
        )
        graph_shapes.require_valid(validation)
        text = encode_canonical(content)
        settings = definition_snapshot.effective_settings(snapshot["settings"])
        return ChosenDefinition(
            f"version {number}",
            text.decode(),
            sha256(text).hexdigest(),
            content,
            settings,
            encode_json(settings).decode(),
        )

    async def _find_expired(self, recorded: RecordedExecution) -> frozenset[str]:
        """Return the ids of the nodes with a large output that the blob storage no longer has; each blob is opened for
        that.

        Raises a 503 error if the storage does not answer.
        """
        owner = BlobOwner(recorded.row.organization_id, recorded.row.key_id)
        lost: set[str] = set()
        for span in recorded.spans:
            if span.output_blob is None:
                continue
            try:
                async with self._blobs.open(owner, BlobReference.from_text(span.output_blob).sha256):
                    pass
            except (BlobLost, InvalidBlobReference):
                lost.add(span.node_id)
            except BlobsUnavailable as error:
                raise errors.not_ready("The blob storage does not answer: try again") from error
        return frozenset(lost)

    async def _load_values(self, plan: _Planning) -> None:
        """Load recorded inputs and outputs, and the recorded output of the trigger, into the plan.

        Lost values are noted as expired; if that of the trigger is lost, `has_outputs` is False. Raises a 503 error if
        the blob storage does not answer.
        """
        recorded = plan.recorded
        row = recorded.row
        values: Select[*tuple[Any, ...]] = select(
            *(col(SpanRow.node_id), col(SpanRow.input), col(SpanRow.output))
        )
        async with self._database.read() as connection:
            rows = await connection.execute(
                values.where(
                    col(SpanRow.execution_id) == recorded.key.execution_id,
                    col(SpanRow.shard) == recorded.key.shard,
                    col(SpanRow.iteration) == "",
                )
            )
            found = {one.node_id: one for one in rows}
            text = await connection.scalar(
                select(col(ExecutionData.trigger)).where(
                    col(ExecutionData.execution_id) == recorded.key.execution_id,
                    col(ExecutionData.shard) == recorded.key.shard,
                )
            )
        large = LargeValues(self._blobs, BlobOwner(row.organization_id, row.key_id), 0)
        spans: list[NodeSpan] = []
        for span in recorded.spans:
            one = found.get(span.node_id)
            if one is not None:
                span = structs.replace(  # noqa: PLW2901 - the span with its values
                    span,
                    input=one.input.encode() if one.input is not None else None,
                    output=one.output.encode() if one.output is not None else None,
                )
            try:
                spans += await large.restore([span])
            except RecordedValueLost:
                plan.expired |= {span.node_id}
                spans.append(structs.replace(span, output_blob=None, input_blob=None))
            except BlobsUnavailable as error:
                raise errors.not_ready("The blob storage does not answer: try again") from error
        plan.spans, plan.has_outputs = spans, True
        if plan.new_trigger is None and text is not None:
            try:
                plan.recorded_trigger = await large.read_trigger(text)
            except (RecordedValueLost, ValueError):
                plan.has_outputs = False
            except BlobsUnavailable as error:
                raise errors.not_ready("The blob storage does not answer: try again") from error


class _CompiledDefinitions:
    """Compiled definitions of the last plans, by hash; used in threads."""

    def __init__(self, catalog: NodeCatalog) -> None:
        self._catalog = catalog
        self._kept: OrderedDict[tuple[str, str], WorkflowProgram] = OrderedDict()

    def compile_program(
        self, organization_id: str, digest: str, content: Mapping[str, Any]
    ) -> WorkflowProgram:
        """Return the compiled program of a definition, cached by its hash up to 5,000 nodes; raises
        `InvalidDefinition`.
        """
        key = (organization_id, digest)
        found = self._kept.get(key)
        if found is None:
            graph = ParsedGraph.from_stored(content)
            catalog = custom_types.catalog_of_definition(self._catalog, content)
            found = WorkflowProgram.compile(graph, catalog, lambda _kind: _run_nothing)
            self._kept[key] = found
            while sum(len(each.nodes) for each in list(self._kept.values())[:-1]) > MAX_KEPT_NODES:
                self._kept.popitem(last=False)
        return found


class _Planning:
    """One plan in the making."""

    def __init__(
        self,
        recorded: RecordedExecution,
        chosen: ChosenDefinition,
        choice: ReplayChoice,
        options: ReplayOptions,
        new_trigger: Json,
        compiled: _CompiledDefinitions,
        clock: RunClock,
    ) -> None:
        self.recorded = recorded
        self.new_trigger = new_trigger
        self.recorded_trigger: Json = None
        self.spans = recorded.spans
        self.has_outputs = False
        self.expired: frozenset[str] = frozenset()
        self.has_expirable = any(span.output_blob is not None for span in recorded.spans)
        self._chosen = chosen
        self._choice = choice
        self._options = options
        self._compiled = compiled
        self._clock = clock
        self._program: WorkflowProgram | None = None
        self._original: ParsedGraph | None = None
        self._rewired_agents: frozenset[str] = frozenset()

    @property
    def needs_trigger(self) -> bool:
        """Whether the recorded trigger must be loaded, since the concurrency key of the new definition
        depends on it.
        """
        concurrency = self._chosen.settings.get("concurrency")
        has_key = isinstance(concurrency, dict) and concurrency.get("key") is not None
        return (
            has_key and self._chosen.config is not None and self.new_trigger is None and not self.has_outputs
        )

    def make(self) -> ReplayPlan:
        """Return the plan by the facts that are loaded so far; called again once more are.

        For a large graph it takes so long that it must run in a thread. Raises a 422 error for unknown nodes and an
        invalid definition.
        """
        if self._program is None:
            self._program = self._compile()
            recorded = ParsedGraph.from_stored(decoding.decode(self.recorded.definition_text))
            # Models and tools of agents are no nodes of a program either: the keys of the agents have them.
            self._original = agent_wiring.remove_providers(recorded)
            if self._program.has_agents:
                chosen = ParsedGraph.from_stored(self._chosen.content)
                self._rewired_agents = agent_wiring.find_rewired_agents(recorded, chosen)
            self._require_known_nodes(self._program.graph)
            _require_left_out_writes(self._choice, self._program)
        row = self.recorded.row
        facts = ReplayFacts(
            caller=RunCaller(
                row.organization_id, row.user_id, row.workflow_id, self.recorded.key.execution_id, row.key_id
            ),
            started_at=row.started_at or row.created_at,
            clock=self._clock,
            original=self._original or self._program.graph,
            program=self._program,
            trigger=self.recorded_trigger if self.new_trigger is None else self.new_trigger,
            has_new_input=self.new_trigger is not None,
            spans=self.spans,
            has_outputs=self.has_outputs,
            written_in_loops=self.recorded.written_in_loops,
            written_in_failed_iterations=self.recorded.written_in_failed_iterations,
            written_in_earlier_loops=self.recorded.written_in_earlier_loops,
            revisions=self.recorded.revisions,
            expired=self.expired,
            rewired_agents=self._rewired_agents,
            answers=self.recorded.answers,
        )
        return plan_replay(facts, self._options)

    def _compile(self) -> WorkflowProgram:
        """Return the compiled program of the chosen definition; raises a 422 error for an invalid one."""
        try:
            organization_id = self.recorded.row.organization_id
            return self._compiled.compile_program(organization_id, self._chosen.hash, self._chosen.content)
        except InvalidDefinition as error:
            message = f"The definition can't run: {error}"
            raise errors.invalid([errors.problem("definition", "invalid-definition", message)]) from error

    def _require_known_nodes(self, graph: ParsedGraph) -> None:
        """Raise a 422 error if the choices name nodes that the definition doesn't have."""
        problems = [
            *_unknown_nodes("from", self._choice.forced, graph),
            *_unknown_nodes("confirm", self._choice.confirmed, graph),
            *_unknown_nodes("skip", self._choice.left_out, graph),
        ]
        if problems:
            raise errors.invalid(problems)

    def complete(self, plan: ReplayPlan) -> PlannedReplay:
        """Return the planned replay with its hash, concurrency limit and content; raises RuntimeError before `make` was
        called.

        The hash changes with the choices, the definition and the decisions, so that a client can confirm exactly this
        plan.
        """
        program, original = self._program, self._original
        if program is None or original is None:
            raise RuntimeError("a plan is completed after it was made")
        row, chosen = self.recorded.row, self._chosen
        kept = [node.node_id for node in plan.nodes if node.use is ResultUse.ITERATIONS]
        key, limit = row.concurrency_key, row.concurrency_limit
        if chosen.config is not None or self.new_trigger is not None:
            trigger = self.recorded_trigger if self.new_trigger is None else self.new_trigger
            wanted = concurrency_limits.concurrency_limit(chosen.settings, row.workflow_id, trigger)
            key, limit = (wanted.key, wanted.runs) if wanted else (None, None)
        context: list[Json] = [
            self.recorded.key.execution_id,
            chosen.hash,
            None if self._choice.input is None else fingerprint(dict(self._choice.input)),
            [*sorted(self._choice.forced)],
            self._choice.refreshes_reads,
            self._choice.refreshes_models,
            self._choice.failed_only,
            *([[*sorted(self._choice.left_out)]] if self._choice.left_out else ()),
        ]
        return PlannedReplay(
            execution_id=self.recorded.key.execution_id,
            workflow_id=row.workflow_id,
            definition=chosen,
            plan=plan,
            hash=plan.digest(*context),
            trigger=None if self.new_trigger is None else encode_json(self.new_trigger).decode(),
            trigger_type=row.trigger_type,
            concurrency_key=key,
            concurrency_limit=limit,
            total_nodes=len(program.graph.nodes),
            dirty={
                loop_id: changed_body_nodes(
                    program.nodes[loop_id], original, program.graph, self._rewired_agents
                )
                for loop_id in kept
            },
            bodies={loop_id: program.nodes[loop_id].body for loop_id in kept},
            steps=_choose_steps(plan, program),
            has_outside_trigger=self.new_trigger is None and _has_outside_trigger(original),
            left_out=self._describe_left_out(plan, program),
            writes=_find_skippable(program),
        )

    def _describe_left_out(self, plan: ReplayPlan, program: WorkflowProgram) -> dict[str, SkippedNode]:
        """Return the nodes that the replay begins with as skipped, by their ids, each with the recorded parts that it
        keeps.

        An agent keeps no key, and a loop neither request nor key: no later replay continues them, since their steps and
        iterations are not copied.
        """
        recorded = {span.node_id: span for span in self.recorded.spans}
        found: dict[str, SkippedNode] = {}
        for node in plan.nodes:
            if node.use is not ResultUse.LEFT_OUT:
                continue
            one, span = program.nodes[node.node_id], recorded.get(node.node_id)
            request, key = (None, None) if span is None or one.body else keep_request(span)
            found[node.node_id] = SkippedNode(
                one.node.label,
                one.node.type,
                keeps_request=request is not None,
                keeps_key=key is not None and one.agent is None,
            )
        return found


def _find_skippable(program: WorkflowProgram) -> frozenset[str]:
    """Return the ids of the nodes that a replay may leave out: writes outside of loops, and loops that write."""
    inside = {inner for node in program.nodes.values() for inner in node.body}
    return frozenset(
        node_id
        for node_id, node in program.nodes.items()
        if node_id not in inside
        and (node.is_write or any(program.nodes[inner].is_write for inner in node.body))
    )


def _require_left_out_writes(choice: ReplayChoice, program: WorkflowProgram) -> None:
    """Raise a 422 error if the choices leave out a node that does not write, is in a loop, or shall run."""
    problems: list[dict[str, Json]] = []
    skippable = _find_skippable(program)
    for node_id in sorted(choice.left_out):
        around = sorted(one for one, other in program.nodes.items() if node_id in other.body)
        if node_id in choice.confirmed | choice.forced:
            message = f"The node {node_id} is left out by `skip`: remove it from `from` and `confirm`, or from `skip`"
            problems.append(errors.problem("skip", "ambiguous", message))
        elif around:
            message = (
                f"The node {node_id} is in a loop: leave out the loop {around[0]} with all of its iterations"
            )
            problems.append(errors.problem("skip", "in-loop", message))
        elif node_id not in skippable:
            message = f"The node {node_id} writes nothing: only writes are left out"
            problems.append(errors.problem("skip", "not-a-write", message))
    if problems:
        raise errors.invalid(problems)


def _has_outside_trigger(graph: ParsedGraph) -> bool:
    """Return whether a node of the graph without inbound connections outputs text of outsiders."""
    from engine.agents import agent_exposure  # noqa: PLC0415 - loaded with the first replay

    return any(
        agent_exposure.gives_outside_text(node.type) for node in graph.nodes if not graph.inbound[node.id]
    )


def _choose_steps(plan: ReplayPlan, program: WorkflowProgram) -> dict[str, StepReuse]:
    """Return the use of recorded steps, by the node ids of the agents of a plan, and of the tools in them that are
    agents; agents that use none are absent.
    """
    found: dict[str, StepReuse] = {}
    for node in plan.nodes:
        if node.answer_reuse is not None:
            inner = _list_inner_agents(program.nodes[node.node_id].agent)
            found |= dict.fromkeys([node.node_id, *inner], node.answer_reuse)
    return found


def _list_inner_agents(agent: AgentProgram | None) -> list[str]:
    """Return the node ids of the tools of an agent that are agents, at all depths."""
    tools = [] if agent is None else [tool.program for tool in agent.tools.values() if tool.program.agent]
    return [node_id for tool in tools for node_id in (tool.node.id, *_list_inner_agents(tool.agent))]


def replay_copy(planned: PlannedReplay, inner: Mapping[ResultUse, Sequence[tuple[str, str]]]) -> ReplayCopy:
    """Return the content of the new execution of a planned replay, for its insertion.

    `inner` has the spans of iterations that it begins with, as node id and iteration, by their use.
    """
    spans: dict[ResultUse, list[tuple[str, str]]] = {
        use: [(node.node_id, "") for node in planned.plan.nodes if node.use is use]
        for use in (ResultUse.SETTLED, ResultUse.IN_FLIGHT, ResultUse.CANDIDATE, ResultUse.UNCONFIRMED)
    }
    for use, more in inner.items():
        spans[use] += more
    settings = planned.definition.settings
    actions = None
    if planned.trigger_type != completion.ON_FAILURE_TRIGGER:
        actions = completion.requested_actions(settings)
    return ReplayCopy(
        definition_hash=planned.definition.hash,
        total_nodes=planned.total_nodes,
        timeout_seconds=RunSettings.from_stored(settings).timeout_seconds,
        config=planned.definition.config,
        trigger=planned.trigger,
        concurrency_key=planned.concurrency_key,
        concurrency_limit=planned.concurrency_limit,
        completion_action=actions,
        spans=spans,
        steps=planned.steps,
        has_outside_trigger=planned.has_outside_trigger,
        left_out=planned.left_out,
    )


def _run_nothing(_call: NodeCall) -> NoReturn:
    raise RuntimeError("a plan runs no node")


def _unknown_nodes(name: str, node_ids: Collection[str], graph: ParsedGraph) -> list[dict[str, Json]]:
    """Return a problem for each node id that the graph does not have, with similar ids; `name` is the field
    of the body.
    """
    found = []
    for node_id in sorted(node_ids):
        if node_id not in graph.by_id:
            near = name_suggestions.suggest_names(node_id[:100], graph.by_id)
            hint = f": did you mean {' or '.join(near)}?" if near else ""
            message = f"The definition has no node {node_id[:100]!r}{hint}"
            found.append(errors.problem(name, "unknown-node", message))
    return found


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────

_FACTS: Final = (
    *(col(SpanRow.node_id), col(SpanRow.sequence), col(SpanRow.label), col(SpanRow.type)),
    *(col(SpanRow.status), col(SpanRow.port), col(SpanRow.attempt), col(SpanRow.started_at)),
    *(col(SpanRow.ended_at), col(SpanRow.input_node), col(SpanRow.error), col(SpanRow.hashes)),
    *(
        col(SpanRow.input_blob),
        col(SpanRow.output_blob),
        col(SpanRow.resolved_config).is_not(None).label("was_sent"),
    ),
)
"""Columns of a span that a plan needs first: no payloads."""


_turn = aliased(SpanRow)
_IS_COMPLETED: Final = col(SpanRow.status) == SpanStatus.COMPLETED
_WAS_SENT: Final = col(SpanRow.resolved_config).is_not(None)
_HAS_COMPLETED_ITERATION: Final = (
    select(col(_turn.node_id))
    .where(
        *(col(_turn.execution_id) == col(SpanRow.execution_id), col(_turn.shard) == col(SpanRow.shard)),
        *(col(_turn.iteration) == col(SpanRow.iteration), col(_turn.port) == CONTINUE),
        col(_turn.status) == SpanStatus.COMPLETED,
    )
    .correlate(SpanRow)
    .exists()
)
"""Condition: the iteration of a span has completed."""


async def _read_execution(
    connection: AsyncConnection, key: ExecutionKey, caller: ApiCaller
) -> RecordedExecution:
    """Return an ended execution with its definition, spans, and the present revisions of its data sources.

    Raises a 404 error unless the caller may see it, 409 if it has not ended.
    """
    statement: Select[*tuple[Any, ...]] = (
        select(Execution, col(Definition.body))
        .join(
            Definition,
            and_(
                col(Definition.organization_id) == col(Execution.organization_id),
                col(Definition.hash) == col(Execution.definition_hash),
            ),
        )
        .where(col(Execution.id) == key.execution_id, visibility_condition(caller))
    )
    found: Row[Any] | None = (await connection.execute(statement)).first()
    if found is None:
        raise errors.not_found("execution")
    resume_runs.require_ended(found.status)
    of_run = (col(SpanRow.execution_id) == key.execution_id, col(SpanRow.shard) == key.shard)
    facts: Select[*tuple[Any, ...]] = select(*_FACTS)
    rows = await connection.execute(
        facts.where(*of_run, col(SpanRow.iteration) == "").order_by(col(SpanRow.sequence))
    )
    spans = [_decode_span(row) for row in rows]
    has_loops = await connection.scalar(
        select(col(SpanRow.node_id)).where(*of_run, col(SpanRow.iteration) != "").limit(1)
    )
    written, in_failed = await _find_written_in_loops(connection, key) if has_loops else (set(), set())
    earlier = await _find_written_earlier(connection, key, found) - written
    used = {name for span in spans if (parts := decode_key(span.hashes)) for name, _ in parts.sources}
    revisions: dict[str, int] = {}
    if used:
        found_sources = await connection.execute(
            select(col(DataSource.id), col(DataSource.revision)).where(
                col(DataSource.organization_id) == caller.organization_id,
                col(DataSource.id).in_(sorted(used)),
            )
        )
        revisions = {row.id: row.revision for row in found_sources}
    return RecordedExecution(
        key=key,
        row=found,
        definition_text=found.body,
        spans=spans,
        written_in_loops=frozenset(written | earlier),
        written_in_failed_iterations=frozenset(in_failed | earlier),
        written_in_earlier_loops=frozenset(earlier),
        revisions=revisions,
        answers=await _count_answers(connection, key),
    )


async def _count_answers(connection: AsyncConnection, key: ExecutionKey) -> dict[str, RecordedAnswers]:
    """Return the numbers of recorded model answers of each agent, by its node id; an agent that is a tool has its own
    entry.

    Agents without answers are absent.
    """
    total = case((run_copies.HAS_CONTENTS, 1), else_=0)
    unfinished = case((and_(run_copies.HAS_CONTENTS, ~run_copies.HAS_SETTLED_AGENT), 1), else_=0)
    node_id = col(AgentStepRow.node_id)
    counted = (
        select(
            *(node_id, func.count().label("answers")),
            *(func.sum(total).label("total"), func.sum(unfinished).label("unfinished")),
        )
        .where(
            *(col(AgentStepRow.execution_id) == key.execution_id, col(AgentStepRow.shard) == key.shard),
            col(AgentStepRow.kind) == StepKind.MODEL,
            col(AgentStepRow.status) == StepStatus.COMPLETED,
            ~run_copies.IS_LEFT,
        )
        .group_by(node_id)
    )
    rows = await connection.execute(counted)
    return {
        row.node_id: RecordedAnswers(
            row.total, row.unfinished, has_unrecorded_contents=row.answers > row.total
        )
        for row in rows
    }


async def _find_written_earlier(connection: AsyncConnection, key: ExecutionKey, found: Row[Any]) -> set[str]:
    """Return the ids of nodes that may have written in loops of the executions that this one replays or resumes.

    A replay that reuses or skips a loop has no spans of its iterations. Deleted executions are not known.
    """
    earlier: list[str] = []
    before = found.replay_of or found.resumed_from
    while before is not None and before not in earlier and len(earlier) < MAX_LINEAGE:
        earlier.append(before)
        links: Select[*tuple[Any, ...]] = select(col(Execution.replay_of), col(Execution.resumed_from)).where(
            col(Execution.id) == before, col(Execution.shard) == key.shard
        )
        row = (await connection.execute(links)).first()
        before = None if row is None else row.replay_of or row.resumed_from
    if not earlier:
        return set()
    written = (
        select(col(SpanRow.node_id))
        .where(
            *(col(SpanRow.execution_id).in_(earlier), col(SpanRow.shard) == key.shard),
            *(col(SpanRow.iteration) != "", or_(_IS_COMPLETED, _WAS_SENT)),
        )
        .distinct()
    )
    return set(await connection.scalars(written))


async def _find_written_in_loops(connection: AsyncConnection, key: ExecutionKey) -> tuple[set[str], set[str]]:
    """Return the ids of nodes in loops that completed or sent a request in any iteration, and of those that completed
    or may have had an effect in iterations that did not finish.

    A node whose only requests in unfinished iterations failed without an effect is in the first set alone. Nodes that
    only read are included: the planner filters by effect.
    """
    of_run = (col(SpanRow.execution_id) == key.execution_id, col(SpanRow.shard) == key.shard)
    written = set(
        await connection.scalars(
            select(col(SpanRow.node_id))
            .where(*of_run, col(SpanRow.iteration) != "", or_(_IS_COMPLETED, _WAS_SENT))
            .distinct()
        )
    )
    in_failed = set(
        await connection.scalars(
            select(col(SpanRow.node_id))
            .where(*of_run, col(SpanRow.iteration) != "", _IS_COMPLETED, ~_HAS_COMPLETED_ITERATION)
            .distinct()
        )
    )
    unfinished: Select[*tuple[Any, ...]] = select(*_FACTS).where(
        *(*of_run, col(SpanRow.iteration) != "", ~_IS_COMPLETED, _WAS_SENT, ~_HAS_COMPLETED_ITERATION)
    )
    for row in await connection.execute(unfinished):
        span = _decode_span(row)
        if may_have_happened(span):
            in_failed.add(span.node_id)
    return written, in_failed


def _decode_span(row: Row[Any]) -> NodeSpan:
    """Return the span of a row with the columns `_FACTS`, without the values of input and output."""
    return NodeSpan(
        node_id=row.node_id,
        label=row.label,
        type=row.type,
        status=SpanStatus(row.status),
        sequence=row.sequence,
        started_at=row.started_at,
        ended_at=row.ended_at,
        port=row.port,
        attempt=row.attempt,
        input_node=row.input_node,
        error=decode_error(row.error),
        resolved_config=_REQUEST if row.was_sent else None,
        hashes=row.hashes,
        input_blob=row.input_blob.encode() if row.input_blob else None,
        output_blob=row.output_blob.encode() if row.output_blob else None,
    )
