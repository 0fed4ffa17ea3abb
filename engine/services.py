"""What the process that runs nodes lends to them: every way out of a node goes through one of these.

The engine and the nodes know the promises alone; who keeps them differs between a shared worker and a pod. Each method
raises `NodeError` for what the node's author or user can mend, with `retryable` where another try may help.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import msgspec

from engine.run_errors import NodeError

if TYPE_CHECKING:
    from engine.values import Json


class RunCaller(msgspec.Struct, frozen=True):
    """For whom a node works: what it may use is decided by this, never by what stands in its config."""

    organization_id: str
    user_id: str
    workflow_id: str
    execution_id: str
    key_id: str
    """The first of a line of resumed executions: what is kept for a run is kept under this."""


class HttpResponse(Protocol):
    """An answer from outside."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def body(self) -> bytes: ...
    @property
    def url(self) -> str: ...


class HttpClientService(Protocol):
    """The guarded way out: refuses private networks unless the operator allowed them."""

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout_seconds: float,
        follow_redirects: bool = True,
    ) -> HttpResponse: ...


class QueryRows(msgspec.Struct, frozen=True):
    """What a query gave."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Json]]
    """Values as JSON has them: what it lacks is text (dates as ISO 8601, exact decimals, UUIDs), bytes are Base64."""


class UpsertRule(msgspec.Struct, frozen=True):
    """What is done where a row with the same key is there already."""

    key: Sequence[str]
    """Columns; none: the row is always new, and the database decides whether that is an error."""
    update: bool = True
    """Replace the other columns; False: leave the row as it is."""


class SqlDatabase(Protocol):
    """One database of a user, over a pool that its data source shares within an organisation."""

    async def query(
        self,
        statement: str,
        parameters: Sequence[Json],
        *,
        max_rows: int,
        max_bytes: int,
        timeout_seconds: float,
    ) -> QueryRows:
        """Run one statement that reads, with its values bound; a `?` stands for each. More than it may give fails."""

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
        """Insert rows in batches, all of them or none; returns how many were inserted or changed."""

    async def execute(self, statement: str, parameters: Sequence[Json], *, timeout_seconds: float) -> int:
        """Run one statement that writes, with its values bound; returns how many rows it changed."""


class StoredObject(msgspec.Struct, frozen=True):
    """An entry of a listing."""

    key: str
    size: int
    etag: str
    modified_at: datetime


class ObjectBucket(Protocol):
    """One bucket of a user, or the part of one below a prefix."""

    async def get(self, key: str, *, max_bytes: int, timeout_seconds: float) -> bytes: ...
    async def put(self, key: str, content: bytes, *, media_type: str, timeout_seconds: float) -> str:
        """Write an object whole; returns its entity tag."""

    async def list(
        self, prefix: str, *, max_objects: int, timeout_seconds: float
    ) -> Sequence[StoredObject]: ...


class MailServerService(Protocol):
    """A mail server of a user, which sends what it takes."""

    async def send(
        self, sender: str, recipients: Sequence[str], message: bytes, *, timeout_seconds: float
    ) -> None:
        """Hand in one mail for all recipients, or for none of them; addresses are bare and in ASCII, as is the mail."""


class DataSourceService(Protocol):
    """Data sources by id, as far as the caller may use them."""

    async def database(self, caller: RunCaller, source_id: str, type: str) -> SqlDatabase: ...  # noqa: A002 - the field's own word
    async def bucket(self, caller: RunCaller, source_id: str) -> ObjectBucket: ...
    async def mail_server(self, caller: RunCaller, source_id: str) -> MailServerService: ...
    async def headers(self, caller: RunCaller, source_id: str, url: str) -> Mapping[str, str]:
        """Return what a request to `url` carries: of http-bearer, http-basic or api-key, if it is for that host."""


class FileFolderService(Protocol):
    """The folders that the operator keeps for organisations, each like a bucket."""

    async def folder(self, caller: RunCaller) -> ObjectBucket:
        """Return the folder of the caller's organisation."""


class BlobService(Protocol):
    """Contents too large, or too raw, for JSON; each belongs to one line of runs and goes with it."""

    async def put(
        self, caller: RunCaller, content: bytes, *, media_type: str, name: str = ""
    ) -> dict[str, Json]:
        """Keep a content, durably; returns its reference: `{"$blob": {sha256, size, type, name}}`."""

    async def get(self, caller: RunCaller, reference: Json, *, max_bytes: int) -> bytes:
        """Return the content behind a reference that this line of runs was given."""


class CodeService(Protocol):
    """User code, run where it can do nothing but compute."""

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
        """Run a script with `inputs` as its globals; returns the value of its last expression, or of `return`."""


class PrintLine(Protocol):
    """What becomes of a line that user code prints."""

    def __call__(self, level: str, message: str, /) -> None: ...


class SubRunService(Protocol):
    """Other workflows, run for this one."""

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
        """Start a run, once for a node and iteration however often that is asked; returns its execution id.

        An awaited one answers the node when it has ended.
        """


class ThrottleService(Protocol):
    """How often something may happen, over all runs of an organisation."""

    async def reserve(
        self, caller: RunCaller, key: str, *, limit: int, per_seconds: float, max_wait_seconds: float
    ) -> datetime:
        """Return when (aware, UTC) one more may pass, and take that place, unless it is too far away."""


class EventWaitRequest(msgspec.Struct, frozen=True):
    """What a node waits for."""

    event_type: str
    """A type, or with `.*` at its end all that begin so."""
    condition: str | None = None
    """JSON: what must hold of the event, which it sees as `item`, with `given` as `data`."""
    given: str = "[]"
    """JSON."""
    look_back_seconds: float = 0.0
    """An event counts that came up to so long before the node was reached."""
    timeout_seconds: float | None = None


class EventWaitService(Protocol):
    """What happens in the organisation."""

    async def expect(
        self, caller: RunCaller, wanted: EventWaitRequest, *, node_id: str, iteration: str
    ) -> datetime | None:
        """See to it that the first such event answers the node; returns when (aware, UTC) it has waited long enough.

        Both are counted from when the node was reached first, however often that is asked.
        """


class _MissingService:
    """Stands for what a process doesn't lend."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __getattr__(self, _name: str) -> NoReturn:
        raise NodeError(f"{self._what} are not to be had where this runs", code="not-available")


def _missing_service(what: str) -> Callable[[], Any]:
    return lambda: _MissingService(what)


@dataclass(frozen=True, slots=True)
class NodeServices:
    """All of them; what a process doesn't have raises `NodeError` when it is used."""

    http: HttpClientService
    data_sources: DataSourceService = field(default_factory=_missing_service("Data sources"))
    files: FileFolderService = field(default_factory=_missing_service("Files"))
    blobs: BlobService = field(default_factory=_missing_service("Blobs"))
    code: CodeService = field(default_factory=_missing_service("Code nodes"))
    runs: SubRunService = field(default_factory=_missing_service("Other workflows"))
    throttle: ThrottleService = field(default_factory=_missing_service("Shared rates"))
    events: EventWaitService = field(default_factory=_missing_service("Events"))
