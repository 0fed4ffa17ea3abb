"""Node types, and the interface between the engine and the implementation of a node.

A node's implementation is a module with one function, `run(call)`, plain or `async`. It returns its output
(any JSON value), a `NodeResult` to choose a port, a `TimerWait`, an `AnswerWait` or a `LoopRequest`; it
raises `NodeError`. It never changes its arguments: inputs and static parts of the config are shared.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec
from msgspec import Struct, field

if TYPE_CHECKING:
    from engine.agents.agent_steps import AgentStep
    from engine.conditions import CompiledCondition
    from engine.expressions import ValueTemplate
    from engine.model_calls import ModelCallRecord
    from engine.services import NodeServices, RunCaller
    from engine.values import Json

OUTPUT = "output"
INPUT = "input"
ERROR = "error"
CONTINUE = "continue"
"""Port of a loop: each item leaves by it, to the body."""
DONE = "done"
"""Port of a loop: the results of all items leave by it."""
TOOL_TYPE = "tool"
"""Type of the tools of agents, which never run alone; their spans are questions whether they may be called."""
MCP_TOOL_TYPE = "mcp-tool"
"""Type that calls tools of tool servers."""
OF_EACH = "[]."
"""Separator in `cases[].port` between a list in a config and a field of each of its items."""


class NodeEffect(StrEnum):
    """Effect of a node on the outside. The journal commits before writes; reads are committed along."""

    PURE = "pure"
    READ = "read"
    WRITE = "write"


class EffectRule(Struct, frozen=True):
    """Effect of a node: a constant, or chosen by one field of its config (an HTTP method, for example)."""

    default: NodeEffect
    deciding_field: str | None = None
    cases: Mapping[str, NodeEffect] = field(default_factory=dict)

    def of(self, config: Mapping[str, Json]) -> NodeEffect:
        """Return the effect of a node under `config`: pure, read or write.

        The value of the deciding field may be in upper or lower case. An unknown value, or one that is still a
        template, gives the default.
        """
        if self.deciding_field is None:
            return self.default
        value = config.get(self.deciding_field)
        return self.cases.get(value.upper(), self.default) if isinstance(value, str) else self.default


class VolatilityRule(Struct, frozen=True):
    """Case in which the result of a node depends on clock or chance; without fields it always does."""

    without: str | None = None
    """Field of the config whose absence makes the node read the clock."""
    field: str | None = None
    value: Json = None
    """Value of `field` for which the rule holds."""

    def applies_to(self, config: Mapping[str, Json]) -> bool:
        """Return whether the rule applies to a node with this config, so that its result depends on clock or
        chance.
        """
        return (self.without is None or self.without not in config) and (
            self.field is None or config.get(self.field) == self.value
        )


class FieldCompilation(StrEnum):
    """Form in which a config field reaches the node if it isn't rendered before the call."""

    CONDITION = "condition"
    """A `CompiledCondition`, which the node tests itself, possibly once per item."""
    VALUE = "value"
    """A `ValueTemplate` that computes `{"$op": …}`, which the node renders itself."""
    LITERAL = "literal"
    """A `ValueTemplate` of the literal text: braces in it are no expression."""


class CpuDemand(StrEnum):
    """Calls of a node that compute for too long for a process with other runs.

    Such a node has no `compiled` fields, and uses only `config`, `unresolved` and `log` of its call. Its
    coroutine awaits nothing but `offload.yield_to_loop`.
    """

    ALWAYS = "always"
    LARGE = "large"
    """Only calls with a large config."""


class OutputDescription(Struct, frozen=True):
    """Knowledge of a node's output before it runs."""

    description: str = ""
    schema: Mapping[str, Json] = field(default_factory=dict)
    """JSON Schema. `additionalProperties = false` excludes other fields, `true` permits any; without it, past
    runs may show them. Empty if the output has no fixed shape.
    """
    keeps_input: bool = False
    """Whether the output contains the fields of the input."""
    dropped_by: tuple[str, Json] | None = None
    """Field and value of the config that remove the fields of the input."""
    fields_of: str | None = None
    """Field of the config whose keys are fields of the output."""


class TaskRules(Struct, frozen=True):
    """Rules for the tasks of a custom node type, which workers of its organization perform."""

    timeout_seconds: float = 300.0
    """Maximum duration of an attempt, from its claim on."""
    lease_seconds: float = 30.0
    """Time without a report of the worker after which an attempt is lost."""
    max_attempts: int = 1
    """Attempts that may fail; lost ones are counted apart."""
    first_delay_seconds: float = 1.0
    """Delay after the first failure; it doubles with each further one if it grows."""
    delay_grows: bool = True
    max_delay_seconds: float = 60.0
    concurrency_limit: int | None = None
    """Maximum number of leased tasks with the same key; None without a limit."""
    concurrency_key: str = ""
    """Template of the key, rendered for each task; empty for one key for the whole type."""
    pool: str = "default"
    """Pool of workers that may claim the tasks."""
    start_timeout_seconds: float | None = None
    """Maximum time until the first claim; None without a limit."""


class NodeType(Struct, frozen=True):
    """Entry of the catalog, as described in its `.toml`, or custom type of an organization."""

    type: str
    name: str
    version: str
    category: str
    description: str
    effect: EffectRule
    config_schema: Mapping[str, Json]
    inputs: tuple[str, ...] = (INPUT,)
    outputs: tuple[str, ...] = (OUTPUT,)
    trigger_kind: str | None = None
    """`webhook`, `rest-api`, `manual`, …: the node starts a graph. None for other nodes."""
    outputs_from: str | None = None
    """Place in the config of the names of further outputs: `cases[].port`."""
    compiled: Mapping[str, FieldCompilation] = field(default_factory=dict)
    """Config fields that the node evaluates itself: `condition`, or `cases[].condition` for each item of a
    list.
    """
    joins: bool = False
    """Whether the node joins branches by its config; see `JoinConfig`."""
    loops: bool = False
    """Whether the nodes behind its port `continue` are run once per item; see `LoopRequest`."""
    input_description: str = ""
    output: OutputDescription = field(default_factory=OutputDescription)
    cpu: CpuDemand | None = None
    is_paid: bool = False
    """Whether calls cost money: the journal commits before and after them, as for writes."""
    volatile: tuple[VolatilityRule, ...] = ()
    """Cases in which a replay treats it as a read, although it only computes."""
    runnable: bool = True
    """False if the node can be drawn and connected, but has no implementation."""
    resources: Mapping[str, Json] = field(default_factory=dict)
    """Resource requests of a pod that runs it: `cpu` and `memory`, as Kubernetes quantities."""
    s3_location: str = ""
    """Address of the package of this version: `s3://bucket/type/version`. Types shipped with the server are
    loaded from its own files.
    """
    examples: tuple[Mapping[str, Json], ...] = ()
    """Examples with `config`, `input`, `port`, and `output`, or the message of its `error`."""
    earlier: Mapping[str, NodeType] = field(default_factory=dict)
    """Earlier versions that nodes may be pinned to, the newest first."""
    changes: str = ""
    """Differences of an earlier version from its successor."""
    task: TaskRules | None = None
    """Rules for its tasks; None for the types of the library."""
    content_hash: str = ""
    """SHA-256 of the document of a custom type, in hexadecimal."""
    is_deprecated: bool = False
    """Whether the catalog hides this version; workflows that have it keep it."""

    @property
    def is_trigger(self) -> bool:
        return self.trigger_kind is not None

    def outputs_of(self, config: Mapping[str, Json]) -> tuple[str, ...]:
        """Return the output ports of a node with this config, without duplicates and without `error`, which
        all nodes have.

        Some types take names of ports from their config; those come first.
        """
        if self.outputs_from is None:
            return self.outputs
        field_name, _, name = self.outputs_from.partition(OF_EACH)
        given = config.get(field_name)
        items = given if isinstance(given, list) else []
        found = [item.get(name) for item in items if isinstance(item, dict)]
        return tuple(dict.fromkeys([*(port for port in found if isinstance(port, str)), *self.outputs]))


def parse_version(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, such as (1, 2, 0), which sort like versions; 0 for a part that is no number."""
    return tuple(int(part) if part.isdecimal() else 0 for part in version.split("."))


class UnknownNodeType(LookupError):
    """Type, or version of a type, that the catalog doesn't contain."""

    def __init__(self, message: str, *, nearest: Sequence[str] = (), version: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.nearest = tuple(nearest)
        """Existing types with similar names."""
        self.version = version
        """Existing version of the type, if only the version is unknown."""


class NodeDirective(Struct, frozen=True):
    """Base of node results other than a bare output."""


class NodeResult(NodeDirective, frozen=True):
    """Output, and the port that it leaves by."""

    output: Json
    port: str = OUTPUT


class TimerWait(NodeDirective, frozen=True):
    """Wait until `until` (aware, UTC), after which the node completes; it occupies no worker."""

    until: datetime
    output: Json


class AnswerSource(StrEnum):
    """Source of the answer that a node waits for."""

    INPUT = "input"
    """A person."""
    RUN = "run"
    """A run that the node has started."""
    EVENT = "event"
    """An event."""
    TASK = "task"
    """A worker of the organization."""
    CALLBACK = "callback"
    """A request to the callback URL that the node has sent."""
    SIGNAL = "signal"
    """A signal to the run."""

    @property
    def is_short(self) -> bool:
        """Whether many waits for such an answer take less than a second."""
        return self in {AnswerSource.RUN, AnswerSource.TASK}


class AnswerWait(NodeDirective, frozen=True):
    """Wait for an answer, with which the node completes; it occupies no worker, or for a second at most."""

    kind: AnswerSource
    request: Json
    """Request, shown to the people who may answer."""
    expires_at: datetime | None = None
    expired: NodeResult | None = None
    """Result of the node without an answer by then; None if it fails with the code `expired`."""
    task: bytes = b""
    """JSON of the task to create together with the wait; empty without one."""


class LoopRequest(NodeDirective, frozen=True):
    """Request to run the nodes behind the port `continue` once per item."""

    items: Sequence[Json]
    concurrency: int = 1
    """Maximum number of iterations at the same time."""
    continues_on_error: bool = False
    """True if an item whose iteration fails is listed with its error; False if the loop fails with it."""


class StepPause(NodeDirective, frozen=True):
    """Interruption between two steps: the node is called again, here or by another worker, and continues there."""


class StepWait(NodeDirective, frozen=True):
    """Wait of an agent for answers to its steps; the node is called again with each of them."""

    places: frozenset[tuple[str, str]]
    """Node id and iteration under which each wait is recorded."""
    until: datetime | None = None
    """Time at which the first question to a person expires; None without one."""
    is_short: bool = False
    """Whether it is for a new task or sub-workflow run, which may end within a second."""


NodeOutcome: TypeAlias = "Json | NodeResult | TimerWait | AnswerWait | LoopRequest | StepPause | StepWait"


class ModelCallLog:
    """Log of the model calls of one node; this base class, for nodes that call no models, records nothing."""

    @property
    def recorded(self) -> Sequence[ModelCallRecord]:
        """Calls that are recorded, also by earlier attempts and other processes."""
        return ()

    @property
    def iteration(self) -> str | None:
        """Iteration under which clients see the answers of these calls; None for the iteration of the node."""
        return None

    def add(self, record: ModelCallRecord) -> None:
        """Record a call together with the next state of the node."""

    def now(self) -> datetime | None:
        """Return the time by the clock of the run; None without a run."""
        return None

    async def commit(self) -> None:
        """Make the recorded calls durable, so that none of them is made again; waits while the database is unavailable.

        If the lease of the run is lost, it does not return: the runner cancels the node.
        """


NO_MODEL_CALLS: Final = ModelCallLog()


class CallDecision(Struct, frozen=True):
    """Decision of people about one tool call."""

    is_approved: bool
    """Whether it is to be made, or made again."""
    reason: str = ""
    """Reason of a denial, for the model."""
    arguments: Mapping[str, Json] | None = None
    """Arguments that the person has given in place of those of the model; None to keep these."""
    result: str | None = None
    """Result of a call with an unknown outcome that was made, as the person says; None for other decisions."""


class AgentSteps:
    """Steps of an agent; this base class, for nodes without steps, records nothing."""

    @property
    def recorded(self) -> Sequence[AgentStep]:
        """Steps in the order of their numbers, also of earlier attempts and other processes."""
        return ()

    @property
    def candidates(self) -> Mapping[int, AgentStep]:
        """Steps of the replayed run that this one has not taken over, by number; empty unless it is a replay."""
        return {}

    @property
    def is_interrupted(self) -> bool:
        """Whether the node should stop before its next step."""
        return False

    def now(self) -> datetime:
        """Return the time for a step, by the clock of the run."""
        raise NotImplementedError

    def record(self, step: AgentStep) -> None:
        """Add a step, or its new state, to the next commit."""

    def close_lost_steps(self) -> None:
        """Record as failed the open steps of a lost worker that had their contents in its memory alone."""

    async def commit(self) -> None:
        """Make everything recorded durable; waits while the database is unavailable.

        If the lease of the run is lost, it does not return: the runner cancels the node.
        """

    @property
    def may_expire(self) -> bool:
        """Whether a question whose time is over counts as expired: the decisions were read after its wait ended."""
        return False

    def place_of(self, step: AgentStep) -> tuple[str, str]:
        """Return node id and iteration under which the question about a tool call is recorded."""
        raise NotImplementedError

    def ask(self, step: AgentStep, approvers: Mapping[str, Json], expires_at: datetime) -> None:
        """Add a question to people about a tool call to the next commit; the question is open until `expires_at`.

        It asks whether the call may be made, or what its unknown outcome was. `approvers` are fields of the question,
        such as `assignees`.
        """
        raise NotImplementedError

    def find_decision(self, step: AgentStep) -> CallDecision | None:  # noqa: ARG002 - for its subclass
        """Return the decision about a tool call; None while there is none."""
        return None

    def close_question(self, step: AgentStep) -> None:
        """Record that the question about a tool call is decided, by its stored answer, or has expired without one."""


class CallableTool(Struct, frozen=True):
    """Tool that an agent may call."""

    name: str
    description: str
    parameters: Mapping[str, Json]
    """JSON Schema of the arguments."""
    effect: NodeEffect
    is_repeated: bool = True
    """Whether a write with an unknown outcome is repeated under its key."""
    approval: str | None = None
    """Calls that a person has to approve, in place of the agent's rule; None without a rule of its own."""
    fingerprint: str = ""
    """Digest of the fixed part of the tool."""
    is_untrusted: bool = False
    """Whether its results may hold text of outsiders."""
    is_agent: bool = False
    """Whether an agent of its own does the calls, in steps that are recorded too."""
    is_paid: bool = False
    """Whether its calls ask language models themselves."""
    asks_about_unknown: bool = False
    """Whether a person decides about a write with an unknown outcome."""


class BudgetRest(Struct, frozen=True):
    """Part of a budget that is left."""

    tokens: int | None = None
    """None without a limit."""
    cost: int | None = None
    """Nano-dollars; None without a limit."""
    has_next_answer: bool = True
    """Whether the cost suffices for an answer as dear as the dearest so far."""


class ToolResult(Struct, frozen=True):
    """Result of a tool call."""

    text: str
    """Text for the model."""
    model_calls: Sequence[ModelCallRecord] = ()
    """Calls of language models that the tool has made."""


class AgentTools:
    """Model and tools of an agent; this base class, for other nodes, has none."""

    async def list_tools(self) -> Sequence[CallableTool]:
        """Return the connected tools in the order of connections.

        A tool that runs a workflow has the effect of that workflow's current version.
        """
        return ()

    @property
    def has_tainted_input(self) -> bool:
        """Whether text of outsiders may be in the prompt."""
        return False

    def render_model_config(self) -> Mapping[str, Json]:
        """Return the config of the node at the port `ai`; empty without one. Raises `ExpressionError`."""
        return {}

    async def perform(
        self,
        step: AgentStep,
        rest: BudgetRest,  # noqa: ARG002 - for its subclass
        *,
        is_tainted: bool,  # noqa: ARG002 - as above
    ) -> ToolResult | StepWait | StepPause:
        """Do a recorded tool call; return its result, or the wait or pause after which it is done again to get it.

        A tool that is an agent, or asks models itself, spends at most `rest`. `is_tainted`: text of outsiders may be in
        the arguments. Raises `NodeError` for a failure of the tool.
        """
        raise LookupError(step.name)

    def collect_calls(self, step: AgentStep) -> Sequence[ModelCallRecord]:  # noqa: ARG002 - for its subclass
        """Return the calls of models that a tool call has made so far, itself or by its agent."""
        return ()

    def count_losses(self, step: AgentStep) -> int:  # noqa: ARG002 - for its subclass
        """Return the number of answers that the agent of a tool call has lost with workers; 0 for other tools."""
        return 0


NO_STEPS: Final = AgentSteps()
NO_TOOLS: Final = AgentTools()


def _ignore_metadata(_metadata: Mapping[str, str]) -> None:
    """Drop the metadata of a node that runs without an execution."""


class NodeCall(msgspec.Struct, frozen=True):
    """Call of a node."""

    config: Mapping[str, Json]
    """Config with defaults and rendered templates, except for the fields in `compiled`."""
    data: Json
    """Input from the parents, with the mapped fields merged in."""
    scope: Mapping[str, Json]
    """Roots of expressions: `data`, `trigger`, `nodes`, `execution`; in a loop `item` and `index` too."""
    conditions: Mapping[str, CompiledCondition]
    """Conditions by config field, or by place: `cases.0.condition`."""
    values: Mapping[str, ValueTemplate]
    unresolved: list[str]
    """Unresolved paths; pass it to templates and conditions that are evaluated late."""
    log: Callable[[str, str], None]
    """`log(level, message)` adds a line to the log of the execution."""
    caller: RunCaller
    node_id: str
    iteration: str
    """Iteration of the enclosing loops: empty outside of loops, `3`, or `3.0` in a nested loop."""
    idempotency_key: str
    """Identical in every attempt of this node in this execution: `execution:node:iteration`."""
    attempt: int
    now: datetime
    services: NodeServices
    is_strict: bool = False
    """Whether a node fails if required data is missing."""
    model_calls: ModelCallLog = NO_MODEL_CALLS
    """Calls of language models that this node has made, in all attempts."""
    steps: AgentSteps = NO_STEPS
    tools: AgentTools = NO_TOOLS
    records_content: bool = True
    """Whether the journal keeps prompts and answers of the node."""
    set_metadata: Callable[[Mapping[str, str]], None] = _ignore_metadata
    """`set_metadata({key: value})` sets metadata of the execution, by which lists find it."""

    def scope_of(self, item: Json, index: int) -> dict[str, Json]:
        """Return the expression roots of the call with `item` and `index`, to evaluate a condition or value
        for an item of a list.
        """
        return {**self.scope, "item": item, "index": index}


RunNode: TypeAlias = Callable[[NodeCall], "NodeOutcome | Awaitable[NodeOutcome]"]
