"""Calls of single nodes, compiled and rendered as in a run."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import cast

from msgspec.structs import replace

from engine.agents.agent_steps import AgentStep
from engine.graph import GraphNode
from engine.model_calls import ModelCallRecord
from engine.node_api import (
    AgentSteps,
    AnswerWait,
    LoopRequest,
    ModelCallLog,
    NodeCall,
    NodeOutcome,
    NodeResult,
    StepPause,
    StepWait,
    TimerWait,
)
from engine.program import compile_node
from engine.run_errors import NodeError
from engine.services import (
    BlobService,
    CodeService,
    DataSourceService,
    EventWaitRequest,
    EventWaitService,
    FileFolderService,
    HttpClientService,
    HttpResponse,
    ModelService,
    NodeServices,
    RunCaller,
    SignalExpectation,
    SignalRequest,
    StateService,
    ThrottleService,
)
from engine.values import Json
from nodes import catalog
from nodes.ai.model_connection import ModelConnection
from nodes.catalog import NodeCatalog
from nodes.lazy_models import LazyModels
from tests.fakes.model_ledger import MemoryLedger

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CALLER = RunCaller("org_1", "user_1", "wf_1", "exec", "exec")


class RecordedState:
    """State of an execution, with the values that nodes have published."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    async def publish(self, caller: RunCaller, key: str, value: bytes) -> None:  # noqa: ARG002 - the protocol's parameter
        self.values[key] = value


class NoSignalWaits:
    """Signal waits of nodes that never get a signal."""

    async def expect(
        self,
        caller: RunCaller,  # noqa: ARG002 - here and below, the protocol's parameters
        wanted: SignalRequest,  # noqa: ARG002 - as above
        *,
        node_id: str,  # noqa: ARG002 - as above
        iteration: str,  # noqa: ARG002 - as above
    ) -> SignalExpectation:
        return SignalExpectation()

    async def reply(self, *_: object) -> None:
        """Store nothing, since no node has received a signal."""


class NoEventWaits:
    """Event waits of nodes that never wait."""

    async def expect(
        self,
        caller: RunCaller,  # noqa: ARG002 - here and below, the protocol's parameters
        wanted: EventWaitRequest,  # noqa: ARG002 - as above
        *,
        node_id: str,  # noqa: ARG002 - as above
        iteration: str,  # noqa: ARG002 - as above
    ) -> datetime | None:
        return None


class NoNetwork:
    """HTTP client for nodes that must not use the network."""

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout_seconds: float,
        follow_redirects: bool = True,
    ) -> HttpResponse:
        raise AssertionError(
            f"{method} {url} was asked for {headers, body, timeout_seconds, follow_redirects}"
        )


class NoModels:
    """Lookup of models for nodes that call the built-in one alone."""

    ledger = MemoryLedger()

    async def find(self, caller: RunCaller, model_id: str) -> ModelConnection:  # noqa: ARG002 - the protocol's parameters
        raise NodeError(f"There is no model {model_id!r} that this run may use", code="model-not-found")

    async def block(self, caller: RunCaller, model_id: str, seconds: float) -> None:
        """Do nothing: the built-in model has no provider."""


class ModelCallList(ModelCallLog):
    """Log of model calls in memory."""

    def __init__(self) -> None:
        self._records: list[ModelCallRecord] = []

    @property
    def recorded(self) -> Sequence[ModelCallRecord]:
        return tuple(self._records)

    def add(self, record: ModelCallRecord) -> None:
        self._records.append(record)


class AgentStepList(AgentSteps):
    """Steps of an agent in memory."""

    def __init__(self) -> None:
        self._steps: list[AgentStep] = []

    @property
    def recorded(self) -> Sequence[AgentStep]:
        return tuple(self._steps)

    def now(self) -> datetime:
        return NOW

    def record(self, step: AgentStep) -> None:
        self._steps[step.number : step.number + 1] = [step]


class OpenThrottle:
    """Throttle that never delays, and records its calls."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, float, float]] = []

    async def reserve(
        self, caller: RunCaller, key: str, *, limit: int, per_seconds: float, max_wait_seconds: float
    ) -> datetime:
        assert caller is CALLER
        self.asked.append((key, limit, per_seconds, max_wait_seconds))
        return NOW


@dataclass
class CallRecord:
    """Outcome of a call of a node: its result, the paths that led to no value, and its log lines."""

    outcome: NodeOutcome = None
    unresolved: list[str] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)

    @property
    def output(self) -> Json:
        assert not isinstance(self.outcome, AnswerWait | LoopRequest | StepPause | StepWait)
        return self.outcome.output if isinstance(self.outcome, NodeResult | TimerWait) else self.outcome

    @property
    def port(self) -> str:
        return self.outcome.port if isinstance(self.outcome, NodeResult) else "output"


async def call(  # noqa: PLR0913 - whichever services a node asks for
    node_type: str,
    config: Mapping[str, Json],
    data: Json = None,
    *,
    http: HttpClientService | None = None,
    throttle: ThrottleService | None = None,
    state: StateService | None = None,
    data_sources: DataSourceService | None = None,
    code: CodeService | None = None,
    blobs: BlobService | None = None,
    files: FileFolderService | None = None,
    events: EventWaitService | None = None,
    models: ModelService | None = None,
    library: NodeCatalog | None = None,
    version: str | None = None,
    is_strict: bool = False,
) -> CallRecord:
    """Run one node on `data` as in a run, without the network unless a service is given; raises the node's error."""
    called = CallRecord()
    library = library or catalog.load_catalog()
    services = NodeServices(
        http=http or NoNetwork(),
        throttle=throttle or OpenThrottle(),
        state=state or RecordedState(),
        signals=NoSignalWaits(),
        models=LazyModels(NoModels, (), ()),
    )
    services = services if code is None else replace(services, code=code)
    services = services if blobs is None else replace(services, blobs=blobs)
    services = services if files is None else replace(services, files=files)
    services = services if events is None else replace(services, events=events)
    services = services if models is None else replace(services, models=models)
    program = compile_node(GraphNode(id="node", type=node_type, version=version, config=config), library)
    assert program.missing is None, program.missing
    scope: dict[str, Json] = {"data": data, "trigger": data, "nodes": {}, "execution": {"id": "exec"}}
    outcome = library.implementation(node_type)(
        NodeCall(
            config=cast("Mapping[str, Json]", program.config.render(scope, called.unresolved)),
            data=data,
            scope=scope,
            conditions=program.conditions,
            values=program.values,
            unresolved=called.unresolved,
            log=lambda level, message: called.lines.append((level, message)),
            caller=CALLER,
            node_id="node",
            iteration="",
            idempotency_key="exec:node:0",
            attempt=1,
            now=NOW,
            services=services if data_sources is None else replace(services, data_sources=data_sources),
            is_strict=is_strict,
            model_calls=ModelCallList(),
            steps=AgentStepList(),
        )
    )
    called.outcome = await outcome if inspect.isawaitable(outcome) else outcome
    return called
