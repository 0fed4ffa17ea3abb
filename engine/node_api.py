"""What a node type is, and what one call of a node is given and releases.

A node's implementation is a module with one function, `run(call)`, plain or `async`. It returns its output
(any JSON value), a `Result` where it chooses ports, a `Wait`, an `Await` or an `Each`; it raises `NodeError`. It never
changes what it was given: inputs and static parts of the config are shared.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

import msgspec

if TYPE_CHECKING:
    from engine.conditions import CompiledCondition
    from engine.expressions import ValueTemplate
    from engine.services import NodeServices, RunCaller
    from engine.values import Json

OUTPUT = "output"
INPUT = "input"
ERROR = "error"
CONTINUE = "continue"
"""Of a loop: the body is behind it, and each item leaves by it."""
DONE = "done"
"""Of a loop: what has come of all items leaves by it."""
OF_EACH = "[]."
"""Stands in `cases[].port` between a list in a config and a field of each of its items."""


class NodeEffect(StrEnum):
    """What running a node does to the world; the journal protects writes, and reads ride along."""

    PURE = "pure"
    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class EffectRule:
    """A node's effect: a constant, or decided by one field of its config (an HTTP method, say)."""

    default: NodeEffect
    deciding_field: str | None = None
    cases: Mapping[str, NodeEffect] = field(default_factory=dict)

    def of(self, config: Mapping[str, Json]) -> NodeEffect:
        """Return the effect under `config`; a value that is still a template gets the default."""
        if self.deciding_field is None:
            return self.default
        value = config.get(self.deciding_field)
        return self.cases.get(value.upper(), self.default) if isinstance(value, str) else self.default


class FieldCompilation(StrEnum):
    """How a config field reaches the node when it isn't rendered before the call."""

    CONDITION = "condition"
    """A `Condition`, to be tested by the node itself, once an item if it likes."""
    VALUE = "value"
    """A `Template` in which `{"$op": …}` is computed, to be rendered by the node itself."""
    LITERAL = "literal"
    """A `Template` of what is written, whatever that looks like: braces are no expression in it."""


class CpuDemand(StrEnum):
    """Which calls of a node take so long to compute that a process with other runs must not do them itself.

    Such a node has no `compiled` fields, and of its call it uses `config`, `unresolved` and `log` alone. What its
    coroutine awaits is its turn, and nothing else.
    """

    ALWAYS = "always"
    LARGE = "large"
    """Those with a large config."""


@dataclass(frozen=True, slots=True)
class OutputDescription:
    """What is known of a node's output before it runs."""

    description: str = ""
    schema: Mapping[str, Json] = field(default_factory=dict)
    """A JSON Schema: `additionalProperties = false` says that there are no other fields, `true` that there may be any;
    where it says nothing, past runs may tell. Empty: it has no shape of its own.
    """
    keeps_input: bool = False
    """The fields that arrive are in it too."""
    dropped_by: tuple[str, Json] | None = None
    """The field and value of the config under which they are not."""
    fields_of: str | None = None
    """The field of the config whose keys are fields of the output."""


@dataclass(frozen=True, slots=True)
class NodeType:
    """One entry of the catalogue, as its `.toml` says."""

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
    """`webhook`, `rest-api`, `manual`, …: the node starts a graph. None: it doesn't."""
    outputs_from: str | None = None
    """Where in the config the names of further outputs stand: `cases[].port`."""
    compiled: Mapping[str, FieldCompilation] = field(default_factory=dict)
    """Config fields that the node evaluates itself: `condition`, or `cases[].condition` for each item of a list."""
    joins: bool = False
    """Branches meet in it as its config says; see `Join`."""
    loops: bool = False
    """The nodes behind its port `continue` are run once for each item; see `Each`."""
    input_description: str = ""
    output: OutputDescription = field(default_factory=OutputDescription)
    cpu: CpuDemand | None = None
    runnable: bool = True
    """False: it may be drawn and connected, but has no implementation to run."""
    resources: Mapping[str, Json] = field(default_factory=dict)
    """What a pod that runs it asks for: `cpu` and `memory`, as Kubernetes writes quantities."""
    s3_location: str = ""
    """The address of the package that holds this version: `s3://bucket/type/version`. What is shipped with the server
    is loaded from the server's own files.
    """
    examples: tuple[Mapping[str, Json], ...] = ()
    """Each: `config`, `input`, `port`, and `output`, or the message of its `error`."""
    earlier: Mapping[str, NodeType] = field(default_factory=dict)
    """Versions before this one that nodes may be pinned to, the newest first."""
    changes: str = ""
    """Of an earlier version: in what it differs from the one that replaced it."""

    @property
    def is_trigger(self) -> bool:
        return self.trigger_kind is not None

    def outputs_of(self, config: Mapping[str, Json]) -> tuple[str, ...]:
        """Return the outputs that a node with this config has, besides `error`."""
        if self.outputs_from is None:
            return self.outputs
        field_name, _, name = self.outputs_from.partition(OF_EACH)
        given = config.get(field_name)
        items = given if isinstance(given, list) else []
        found = [item.get(name) for item in items if isinstance(item, dict)]
        return tuple(dict.fromkeys([*(port for port in found if isinstance(port, str)), *self.outputs]))


class UnknownNodeType(LookupError):
    """The catalogue has no such type, or not in that version."""

    def __init__(self, message: str, *, nearest: Sequence[str] = (), version: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.nearest = tuple(nearest)
        """Types that it has, with names like the one that was asked for."""
        self.version = version
        """The version that it has of the type, where that is what doesn't fit."""


class NodeDirective:
    """What a node returns that is more than its output."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class NodeResult(NodeDirective):
    """An output and the port it leaves by."""

    output: Json
    port: str = OUTPUT


@dataclass(frozen=True, slots=True)
class TimerWait(NodeDirective):
    """The node is done when `until` (aware, UTC) has passed; the worker is free meanwhile."""

    until: datetime
    output: Json


class AnswerSource(StrEnum):
    """Whose answer a node waits for."""

    INPUT = "input"
    """A person's."""
    RUN = "run"
    """That of a run that the node has started."""
    EVENT = "event"
    """An event's."""


@dataclass(frozen=True, slots=True)
class AnswerWait(NodeDirective):
    """The node is done when somebody has answered; the worker is free meanwhile."""

    kind: AnswerSource
    request: Json
    """What is asked: shown to those who may answer."""
    expires_at: datetime | None = None
    expired: NodeResult | None = None
    """What the node gives when nobody has answered by then; None: it fails, with the code `expired`."""


@dataclass(frozen=True, slots=True)
class LoopRequest(NodeDirective):
    """The node, a loop, is done when what is behind its port `continue` has been run for each item."""

    items: Sequence[Json]
    concurrency: int = 1
    """Turns at once."""
    continues_on_error: bool = False
    """An item whose turn fails is listed with its error; False: the loop fails with it."""


NodeOutcome: TypeAlias = "Json | NodeResult | TimerWait | AnswerWait | LoopRequest"


class NodeCall(msgspec.Struct, frozen=True):
    """One call of a node."""

    config: Mapping[str, Json]
    """After defaults and with every template rendered, but for the fields in `compiled`."""
    data: Json
    """What arrived from the parents, with the mapped fields laid over it."""
    scope: Mapping[str, Json]
    """The roots of expressions: `data`, `trigger`, `nodes`, `execution`; in a loop `item` and `index` too."""
    conditions: Mapping[str, CompiledCondition]
    """By the field that holds one, or by the place: `cases.0.condition`."""
    values: Mapping[str, ValueTemplate]
    unresolved: list[str]
    """Paths that found nothing; handed to whatever is evaluated late."""
    log: Callable[[str, str], None]
    """`log(level, message)`: a line in the execution's log."""
    caller: RunCaller
    node_id: str
    iteration: str
    """Which turn of the loops around it this is: empty outside of any, `3`, or `3.0` in a loop in a loop."""
    idempotency_key: str
    """The same on every attempt of this node in this execution: `execution:node:iteration`."""
    attempt: int
    now: datetime
    services: NodeServices
    is_strict: bool = False
    """Whether a node fails where what must be there is missing."""

    def scope_of(self, item: Json, index: int) -> dict[str, Json]:
        """Return the scope in which a condition or value sees one item of a list."""
        return {**self.scope, "item": item, "index": index}


RunNode: TypeAlias = Callable[[NodeCall], "NodeOutcome | Awaitable[NodeOutcome]"]
