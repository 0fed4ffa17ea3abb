"""Services of a process for its nodes: all external effects of a node go through them. Also its control over a run.

The engine and the nodes know only these protocols; shared workers and pods implement them differently. Each
method raises `NodeError` for errors that the author or user of the node can fix. `retryable` means that
another attempt may succeed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from datetime import datetime
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

import msgspec
from msgspec import Struct, field

from engine.run_errors import NodeError

if TYPE_CHECKING:
    from engine.model_calls import ChatRequest, ModelReply, NodeSpending
    from engine.model_prices import ModelPrice
    from engine.values import Json


class RunCaller(msgspec.Struct, frozen=True):
    """Identity that a node works for. It alone decides access, never the node's config."""

    organization_id: str
    user_id: str
    workflow_id: str
    execution_id: str
    key_id: str
    """Id of the first run of the chain of runs; blobs of the whole chain are stored under it."""
    write_key_id: str = ""
    """Id in idempotency keys; empty: `key_id`. A replay has its own, so that its writes have new keys."""
    is_tainted: bool = False
    """Whether text of outsiders may be in the input of the node, so that it is in that of a run that it starts."""
    is_read_only: bool = False
    """Whether the node may start only runs that write nothing."""

    @property
    def key_prefix(self) -> str:
        return self.write_key_id or self.key_id


def idempotency_key_of(prefix: str, node_id: str, iteration: str) -> str:
    """Return the idempotency key of a node: `prefix` is the execution id in it, `iteration` empty outside of loops."""
    return f"{prefix}:{node_id}:{iteration or 0}"


_used_sources: Final[ContextVar[set[tuple[str, int]] | None]] = ContextVar("used_sources", default=None)


def collect_source_uses() -> set[tuple[str, int]]:
    """Begin to collect the data sources that the current task uses from now on; return the set that receives
    id and revision.
    """
    uses: set[tuple[str, int]] = set()
    _used_sources.set(uses)
    return uses


def note_source_use(source_id: str, revision: int) -> None:
    """Add a data source to the set of the current task, if it collects them."""
    uses = _used_sources.get()
    if uses is not None:
        uses.add((source_id, revision))


class HttpResponse(Protocol):
    """Response of an external server."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def body(self) -> bytes: ...
    @property
    def url(self) -> str: ...


class HttpClientService(Protocol):
    """Guarded HTTP client: refuses private networks unless the operator allows them."""

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
        """Send a request, and return the response of any final status, 4xx and 5xx too; the time limit spans redirects
        and body.

        Raises `NodeError` for a request that is refused or invalid, and without a complete response. Without
        `follow_redirects`, a redirect is returned as it is.
        """


class QueryRows(msgspec.Struct, frozen=True):
    """Result of a query."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Json]]
    """Values as JSON; other types become text (dates as ISO 8601, exact decimals, UUIDs), bytes Base64."""


class UpsertRule(msgspec.Struct, frozen=True):
    """Handling of rows with an existing key."""

    key: Sequence[str]
    """Key columns. Without any, each row is inserted, and the database decides whether that is an error."""
    update: bool = True
    """True to replace the other columns; False to leave the row unchanged."""


class SqlDatabase(Protocol):
    """Database of a user, over a pool that its data source shares within an organization."""

    async def query(
        self,
        statement: str,
        parameters: Sequence[Json],
        *,
        max_rows: int,
        max_bytes: int,
        timeout_seconds: float,
    ) -> QueryRows:
        """Run a reading statement with bound values, a `?` for each.

        Raises `NodeError` for a statement that writes, a result above `max_rows` or `max_bytes`, the time limit, and
        failures of the server.
        """

    async def write(
        self,
        table: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Json]],
        *,
        upsert: UpsertRule,
        batch_rows: int,
        timeout_seconds: float,
    ) -> int:
        """Insert rows in batches, all or none; `upsert` decides about rows with an existing key.

        Returns the number of inserted or changed rows; without rows or columns it is 0, and nothing is sent. Raises
        `NodeError` for invalid names or values, the time limit, and failures of the server.
        """

    async def execute(self, statement: str, parameters: Sequence[Json], *, timeout_seconds: float) -> int:
        """Run a writing statement with bound values, a `?` for each; return the number of changed rows.

        Raises `NodeError` for a refused statement, the time limit, and failures of the server.
        """


class StoredObject(msgspec.Struct, frozen=True):
    """Entry of a listing."""

    key: str
    size: int
    etag: str
    modified_at: datetime


class ObjectBucket(Protocol):
    """Bucket of a user, or the part of a bucket below a prefix."""

    async def get(self, key: str, *, max_bytes: int, timeout_seconds: float) -> bytes:
        """Return the content of an object.

        Raises `NodeError` if it is missing or larger than `max_bytes`, at the time limit, and for failures of the
        storage.
        """

    async def put(self, key: str, content: bytes, *, media_type: str, timeout_seconds: float) -> str:
        """Write an object as a whole, in place of an earlier one; return its entity tag.

        Raises `NodeError` for content over 50 MB, at the time limit, and for failures of the storage.
        """

    async def list(self, prefix: str, *, max_objects: int, timeout_seconds: float) -> Sequence[StoredObject]:
        """Return all objects whose keys begin with a prefix, sorted by key; empty if there are none.

        Raises `NodeError` above `max_objects`, at the time limit, and for failures of the storage.
        """


class MailServerService(Protocol):
    """Mail server of a user, for outgoing mail."""

    async def send(
        self, sender: str, recipients: Sequence[str], message: bytes, *, timeout_seconds: float
    ) -> None:
        """Send one composed mail to all recipients or to none; addresses are bare and in ASCII, as is the mail.

        Raises `NodeError` if the server refuses the sender, any recipient or the mail, can't be reached, or at the time
        limit.
        """


class ToolCallRequest(msgspec.Struct, frozen=True):
    """Call of a tool of a tool server."""

    tool: str
    arguments: Mapping[str, Json]
    idempotency_key: str
    """Key by which a server may recognize a repeated call."""
    hash: str = ""
    """SHA-256 of the definition that the workflow names, in hexadecimal; empty if it names none."""
    is_read: bool = False
    """Whether the workflow says that the call only reads."""


class ToolServerService(Protocol):
    """Tool server of a user."""

    async def call(self, request: ToolCallRequest) -> Json:
        """Call a tool once, and return its result.

        Raises `NodeError` for failures of the server or the tool, and before the call if nobody has accepted the tool,
        or its definition has changed since.
        """


class DataSourceService(Protocol):
    """Data sources by id, restricted to those that the caller may use."""

    async def database(self, caller: RunCaller, source_id: str, type: str) -> SqlDatabase:  # noqa: A002 - the field's own word
        """Return the database of a data source, which connects at the first statement.

        Raises `NodeError` if the caller may not use the data source, or its type is not `type`.
        """

    async def bucket(self, caller: RunCaller, source_id: str) -> ObjectBucket:
        """Return the bucket of an S3 data source, without connecting; raises `NodeError` if it can't be used."""

    async def mail_server(self, caller: RunCaller, source_id: str) -> MailServerService:
        """Return the mail server of an SMTP data source, without connecting; raises `NodeError` if it can't be used."""

    async def tool_server(self, caller: RunCaller, source_id: str) -> ToolServerService:
        """Return the tool server of a data source, without connecting; raises `NodeError` if it can't be used."""

    async def headers(self, caller: RunCaller, source_id: str, url: str) -> Mapping[str, str]:
        """Return authorization headers (http-bearer, http-basic, api-key) for `url`.

        Raises `NodeError` if the data source lists hosts and that of `url` is not among them, and if the data source
        can't be used or has another type.
        """


class FileFolderService(Protocol):
    """Folders that the operator provides to organizations, with the interface of a bucket."""

    async def folder(self, caller: RunCaller) -> ObjectBucket:
        """Return the folder of the caller's organization, in which file nodes read and write."""


class BlobService(Protocol):
    """Blobs: contents too large for JSON, or binary. Each belongs to one chain of runs."""

    async def put(
        self, caller: RunCaller, content: bytes, *, media_type: str, name: str = ""
    ) -> dict[str, Json]:
        """Store content durably; return its reference: `{"$blob": {sha256, size, type, name}}`.

        Raises `NodeError` above 50 MB, and (retryable) if the storage is unavailable.
        """

    async def get(self, caller: RunCaller, reference: Json, *, max_bytes: int) -> bytes:
        """Return the content of a blob of the caller's chain of runs, by its reference.

        Raises `NodeError` for an invalid reference, a missing or corrupt blob, content over `max_bytes`, and
        (retryable) if the storage is unavailable.
        """


class CodeService(Protocol):
    """Sandboxed user code, which can only compute."""

    async def run(
        self,
        caller: RunCaller,
        source: str,
        inputs: Mapping[str, Json],
        /,
        *,
        timeout_seconds: float,
        max_memory_bytes: int,
        print_line: PrintLine,
    ) -> Json:
        """Run a Python script with `inputs` as globals; return the value of its last expression or `return`.

        `print_line` gets each printed line. Raises `NodeError` for a failing script, and above a limit of
        time or memory.
        """


class PrintLine(Protocol):
    """Callback for a line that user code prints."""

    def __call__(self, level: str, message: str, /) -> None: ...


class SubRunService(Protocol):
    """Sub-workflow runs."""

    async def start(
        self,
        caller: RunCaller,
        workflow_id: str,
        trigger_inputs: Json,
        *,
        node_id: str,
        iteration: str,
        awaited: bool,
    ) -> str:
        """Start a run of another workflow, at most once per node and iteration; return its execution id, that of the
        earlier run in a repeated call.

        It doesn't wait for the end of the run; an `awaited` run answers the node then. Raises `NodeError`, also for a
        workflow that writes if the caller may only read.
        """

    async def may_write(self, caller: RunCaller, workflow_id: str) -> bool:
        """Return whether a run of another workflow may write, as it is now; true for a missing workflow."""


class ThrottleService(Protocol):
    """Rate limits shared by all runs of an organization."""

    async def reserve(
        self, caller: RunCaller, key: str, *, limit: int, per_seconds: float, max_wait_seconds: float
    ) -> datetime:
        """Reserve the next free slot of a rate and return its time (aware, UTC); each call reserves another slot, for
        which the caller itself waits.

        The rate is `limit` slots, evenly spaced, per `per_seconds`, shared by all users of `key` in the organization.
        Raises a retryable `NodeError`, and reserves nothing, if the slot is over `max_wait_seconds` away.
        """


class EventWaitRequest(msgspec.Struct, frozen=True):
    """Event that a node waits for."""

    event_type: str
    """Event type, or with a trailing `.*` all types with that prefix."""
    condition: str | None = None
    """JSON of a condition on the event, which it sees as `item`, with `given` as `data`."""
    given: str = "[]"
    """JSON list of values."""
    look_back_seconds: float = 0.0
    """Maximum age of a matching event at the time when the node was reached."""
    timeout_seconds: float | None = None


class SignalRequest(msgspec.Struct, frozen=True):
    """Signal that a node waits for."""

    name: str
    timeout_seconds: float | None = None


class SignalExpectation(msgspec.Struct, frozen=True):
    """State of a node that waits for a signal."""

    expires_at: datetime | None = None
    """End of the wait (aware, UTC); None without one, or with an answer."""
    answer: bytes | None = None
    """Stored answer of the node, as in `engine.answer_payloads`; None while it waits."""


class ApprovalLinkService(Protocol):
    """Links that answer questions of a run without an account."""

    async def create_links(self, caller: RunCaller, places: Sequence[tuple[str, str]]) -> Sequence[str]:
        """Return the URL of a link for each node, given by id and iteration, in their order; the same in every call.

        Raises `NodeError` without a public address of the server, and if the run no longer exists.
        """


class CallbackService(Protocol):
    """Callback URLs, by which other systems answer a node, and signatures of the requests that carry them."""

    async def create_url(self, caller: RunCaller, *, node_id: str, iteration: str) -> str:
        """Return the callback URL of a node; the same in every call.

        Raises `NodeError` without a public address of the server.
        """

    async def sign(self, caller: RunCaller, message_id: str, body: bytes) -> Mapping[str, str]:
        """Return the headers that sign a request by Standard Webhooks with the organization's secrets.

        Raises `NodeError` if the organization has no signing secret.
        """


class EventWaitService(Protocol):
    """Events of the organization."""

    async def expect(
        self, caller: RunCaller, wanted: EventWaitRequest, *, node_id: str, iteration: str
    ) -> datetime | None:
        """Let the first matching event answer the node; return the end of the wait (aware, UTC).

        None if the node waits without a limit, has its answer already or never started, or the run is gone. Look-back
        and timeout count from when the node was first reached, also in repeated calls.
        """


class SignalWaitService(Protocol):
    """Signals to the run of a node."""

    async def expect(
        self, caller: RunCaller, wanted: SignalRequest, *, node_id: str, iteration: str
    ) -> SignalExpectation:
        """Let the earliest unread signal of a name, or else the next one, answer the node; return the end of its wait,
        or the answer, which may have been given before this call.

        The result has neither if the node waits without a limit, the run is gone, or the node never started. The
        timeout counts from when the node was first reached, also in repeated calls.
        """

    async def reply(self, caller: RunCaller, node_id: str, iteration: str, value: bytes) -> None:
        """Store a reply (JSON) to the signal that a node has received in this iteration or an enclosing one.

        The first reply counts; without such a signal, nothing happens. Raises `NodeError` above the maximum size.
        """


class StateService(Protocol):
    """State of the run of a node, which clients read."""

    async def publish(self, caller: RunCaller, key: str, value: bytes) -> None:
        """Store the value (JSON) of a key, in place of an earlier one; may be repeated. Nothing is stored once the run
        has ended.

        Raises `NodeError` above the maximum size of a state.
        """


class ModelService(Protocol):
    """Language models, restricted to those that the caller may use."""

    async def complete(
        self,
        caller: RunCaller,
        model_id: str,
        request: ChatRequest,
        *,
        idempotency_key: str,
        spending: NodeSpending,
        on_text: Callable[[str], None] | None = None,
    ) -> ModelReply:
        """Ask a model once, and return its complete answer with its cost; `on_text` gets its text as it is written.

        The most that the call may cost is reserved before in the budgets of the node (in `spending`), the run and the
        organization's month. Each call needs an idempotency key of its own, also a repeated one. Raises
        `ModelCallFailed` if the model has not answered, and other `NodeError`s before anything is sent:
        `model-budget-exceeded` if a budget doesn't suffice.
        """

    async def read_price(self, caller: RunCaller, model_id: str) -> ModelPrice | None:
        """Return the current price of a model; None if it is unknown.

        Raises `NodeError` for a model that the caller may not use.
        """


class AnswerOrigin(msgspec.Struct, frozen=True):
    """Step of which a model writes the answer."""

    execution_id: str
    node_id: str
    iteration: str
    number: int
    """Number of the step of an agent; for other nodes, that of the answer within the node."""
    attempt: int


class LiveAnswer(Protocol):
    """Answer of a model that clients see while it is written."""

    def begin(self, model_id: str) -> None:
        """Begin the text of the next call of a model, after a failed one for example."""

    def add(self, text: str) -> None:
        """Append text to what clients see of this call; the caller has removed secrets from it."""

    def drop(self, reason: str) -> None:
        """Drop the text of a call that has failed; `reason` is the code of the failure."""


class LiveAnswerService(Protocol):
    """Answers of models that clients see while they are written. Best effort: it delays no run, and fails none."""

    def open(self, origin: AnswerOrigin) -> AbstractContextManager[LiveAnswer]:
        """Return a context with an empty answer, for one attempt at a step, to which the block adds text.

        The answer is complete after the block, and dropped if the block raises.
        """


class HiddenAnswers:
    """Answers that nobody sees; implements both protocols above."""

    def open(self, origin: AnswerOrigin) -> AbstractContextManager[LiveAnswer]:  # noqa: ARG002 - the protocol's parameter
        """Return a context with an answer that forgets its text."""
        return nullcontext(self)

    def begin(self, model_id: str) -> None:
        """Do nothing."""

    def add(self, text: str) -> None:
        """Do nothing."""

    def drop(self, reason: str) -> None:
        """Do nothing."""


HIDDEN_ANSWERS: Final = HiddenAnswers()


class _MissingService:
    """Placeholder for a service that a process doesn't provide."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, _attribute: str) -> NoReturn:
        raise NodeError(f"{self._name} are not available in this process", code="not-available")


def _missing_service(name: str) -> Callable[[], Any]:
    """Return a factory of a placeholder for a service that the process doesn't provide; each use of one raises
    `NodeError`.
    """
    return lambda: _MissingService(name)


class NodeServices(Struct, frozen=True):
    """Services for nodes; using one that the process doesn't provide raises `NodeError`."""

    http: HttpClientService
    data_sources: DataSourceService = field(default_factory=_missing_service("Data sources"))
    files: FileFolderService = field(default_factory=_missing_service("Files"))
    blobs: BlobService = field(default_factory=_missing_service("Blobs"))
    code: CodeService = field(default_factory=_missing_service("Code nodes"))
    runs: SubRunService = field(default_factory=_missing_service("Sub-workflows"))
    throttle: ThrottleService = field(default_factory=_missing_service("Shared rate limits"))
    events: EventWaitService = field(default_factory=_missing_service("Events"))
    signals: SignalWaitService = field(default_factory=_missing_service("Signals"))
    state: StateService = field(default_factory=_missing_service("States of executions"))
    models: ModelService = field(default_factory=_missing_service("Language models"))
    live_answers: LiveAnswerService = HIDDEN_ANSWERS
    approvals: ApprovalLinkService = field(default_factory=_missing_service("Links of approvals"))
    callbacks: CallbackService = field(default_factory=_missing_service("Callbacks"))


class ControlRequest(IntEnum):
    """Requests in order of precedence: a stronger request replaces a weaker one, never the reverse."""

    HAND_OFF = 1
    """Complete the nodes in progress, start none, and let another worker continue."""
    STOP = 2
    """Complete the nodes in progress, start none, and end as stopped."""
    HAND_OFF_NOW = 3
    """Cancel the nodes in progress, and let another worker continue."""
    CANCEL = 4
    """Cancel the nodes in progress, and end as cancelled."""
    ABANDON = 5
    """Cancel the nodes in progress, and write nothing: the lease is lost."""


class RunControl:
    """Control of one run; use it only from the run's event loop."""

    def __init__(self) -> None:
        self.request: ControlRequest | None = None
        self.changed = asyncio.Event()
        self.has_new_answers = False
        """Whether an answer was stored for a node since the run has last read its answers."""

    def ask(self, request: ControlRequest) -> None:
        """Set a request to the run and wake the waiters of `changed`; ignored if the same or a stronger request, by the
        order of `ControlRequest`, is set.
        """
        if self.request is None or request > self.request:
            self.request = request
            self.changed.set()

    def announce_answer(self) -> None:
        """Let the run read the answers to its nodes now, because a new one is stored."""
        self.has_new_answers = True
        self.changed.set()
