"""What a pod asks of the gateway in the place of a database, and what it is answered: bodies of `/internal/v1/…`.

Every call carries `Authorization: Bearer` with the token of its deployment, and in `X-Runner` the name of the pod and
when its process began, `<pod>/<milliseconds since 1970>`: the two together hold the leases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Final

import msgspec

from engine.run_records import NodeSpan
from journal.store import ClaimedRun, RunWrite
from models.loss_limits import MAX_ISOLATION_LOSSES

PREFIX: Final = "/internal/v1"
RUNNER_HEADER: Final = "X-Runner"
NODE_ERROR_HEADER: Final = "X-Node-Error"
"""Stands on refusals that are the node's own to see: `final`, or `retryable`."""
RETRYABLE: Final = "retryable"
FINAL: Final = "final"

MAX_CLAIM: Final = 50
MAX_WRITES: Final = 200
MAX_RUNS: Final = 10_000
"""Runs that one pod holds at once."""
MAX_LEASE_SECONDS: Final = 600.0
MAX_WAIT_SECONDS: Final = 25.0
MAX_RECORD_BYTES: Final = 80_000_000
"""A run commits once it has 10 MB to tell, or a single output of up to 50 MB; Base64 adds a third."""
SPANS_PER_PAGE: Final = 200
MAX_FILTER_CHARACTERS: Final = 65_536

LeaseSeconds = Annotated[float, msgspec.Meta(gt=0, le=MAX_LEASE_SECONDS)]
Ids = Annotated[list[str], msgspec.Meta(max_length=MAX_RUNS)]


class ServerDatabaseAddress(msgspec.Struct, frozen=True):
    """Where the server keeps its own data: no data source leads there."""

    host: str
    port: int
    database: str


class PodContact(msgspec.Struct, frozen=True):
    """What a pod is told first."""

    organization_id: str
    shard: int
    definition_hash: str
    definition: str
    own_database: ServerDatabaseAddress | None
    """None where it is a file, which no address leads to."""
    is_stopped: bool = False
    """Its pods are to end, and their runs have had their time to."""
    now: datetime | None = None
    """The database's time; None from a gateway of an earlier version."""


class WorkPollRequest(msgspec.Struct, frozen=True):
    """Wait until there is work, where the pod can take some, or somebody asks something of a run that it holds."""

    seconds: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT_SECONDS)]
    wants_work: bool
    heard: Mapping[str, str] = {}
    """What was asked of its runs, as far as it knows: `stop` or `cancel`, by execution id."""
    arrivals: Mapping[str, int] = {}
    """How many arrivals it has been told of, by gateway: of one more it is told at once, even if it wants no work."""


class WorkPollResponse(msgspec.Struct, frozen=True):
    """What the wait was for; neither where it was in vain."""

    has_work: bool = False
    requests: Mapping[str, str] = {}
    gateway: str = ""
    arrivals: int = 0
    """How many runs, or batches of them, have arrived there for this deployment."""


class ClaimRequest(msgspec.Struct, frozen=True):
    """Take the best pending runs."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_CLAIM)]
    lease_seconds: LeaseSeconds
    is_trial: bool = False
    """Suspects, and nothing else."""
    max_isolation_losses: Annotated[int, msgspec.Meta(ge=0, le=MAX_ISOLATION_LOSSES)] = MAX_ISOLATION_LOSSES


class ClaimResponse(msgspec.Struct, frozen=True):
    """Runs that are now the pod's."""

    runs: Sequence[ClaimedRun]


class SuspectsRequest(msgspec.Struct, frozen=True):
    """Look for runs of this deployment to be put on trial."""

    max_isolation_losses: Annotated[int, msgspec.Meta(ge=0, le=MAX_ISOLATION_LOSSES)]


class SuspectsResponse(msgspec.Struct, frozen=True):
    """Whether runs of this deployment wait to be put on trial."""

    has_suspects: bool


class RecordRequest(msgspec.Struct, frozen=True):
    """Write what runs have done; a repetition changes nothing."""

    writes: Annotated[list[RunWrite], msgspec.Meta(max_length=MAX_WRITES)]


class RecordResponse(msgspec.Struct, frozen=True):
    """The runs that still held their tokens."""

    held: Sequence[str]
    unwritten: Sequence[str] = ()
    """Those whose rows another transaction has locked."""


class LeaseIdentity(msgspec.Struct, frozen=True):
    """A lease to be renewed."""

    execution_id: str
    shard: int
    token: int


class RenewRequest(msgspec.Struct, frozen=True):
    """Extend leases."""

    leases: Annotated[list[LeaseIdentity], msgspec.Meta(max_length=MAX_RUNS)]
    lease_seconds: LeaseSeconds


class RenewResponse(msgspec.Struct, frozen=True):
    """Those that were extended, with what was asked of each run meanwhile."""

    requests: Mapping[str, str | None]
    locked: Sequence[str] = ()
    """Those that were neither extended nor lost."""
    now: datetime | None = None
    """The database's time; None from a gateway of an earlier version."""


class ReleaseRequest(msgspec.Struct, frozen=True):
    """Give back what this pod holds by the rows, and never began."""

    held: Ids


class CountResponse(msgspec.Struct, frozen=True):
    """How many rows a call has changed."""

    count: int


class DefinitionsRequest(msgspec.Struct, frozen=True):
    """Read definitions that runs of this pod were accepted with."""

    hashes: Annotated[list[str], msgspec.Meta(max_length=MAX_CLAIM)]


class DefinitionsResponse(msgspec.Struct, frozen=True):
    """Texts by their hashes."""

    texts: Mapping[str, str]


class RunsRequest(msgspec.Struct, frozen=True):
    """Read something of runs that this pod holds."""

    execution_ids: Ids


class SpansRequest(msgspec.Struct, frozen=True):
    """Read a page of what was recorded of one run."""

    execution_id: str
    after: int = 0
    """The sequence number of the last span of the page before."""


class SpansResponse(msgspec.Struct, frozen=True):
    """A page; a full one may have another behind it."""

    spans: Sequence[NodeSpan]


class LogPositions(msgspec.Struct, frozen=True):
    """The highest sequence number of each run's log."""

    last_lines: Mapping[str, int]


class NodeAnswerRecord(msgspec.Struct, frozen=True):
    """What a node was answered."""

    execution_id: str
    node_id: str
    iteration: str
    payload: bytes


class NodeAnswersResponse(msgspec.Struct, frozen=True):
    """All of several runs."""

    answers: Sequence[NodeAnswerRecord]


class DataSourceRequest(msgspec.Struct, frozen=True):
    """Open a data source for a run that this pod holds."""

    source_id: Annotated[str, msgspec.Meta(max_length=64)]


class StartRunRequest(msgspec.Struct, frozen=True):
    """Start a run for a node of one that this pod holds; once, however often that is asked."""

    workflow_id: str
    inputs: msgspec.Raw
    node_id: str
    iteration: str
    awaited: bool


class StartRunResponse(msgspec.Struct, frozen=True):
    """The run."""

    execution_id: str


class ExpectEventRequest(msgspec.Struct, frozen=True):
    """Have a node of a run that this pod holds wait for an event; once, however often that is asked."""

    node_id: Annotated[str, msgspec.Meta(max_length=64)]
    iteration: Annotated[str, msgspec.Meta(max_length=200)]
    event_type: Annotated[str, msgspec.Meta(pattern=r"^[^\s*]{1,200}(\.\*)?\Z")]
    condition: Annotated[str, msgspec.Meta(max_length=MAX_FILTER_CHARACTERS)] | None
    given: Annotated[str, msgspec.Meta(max_length=MAX_FILTER_CHARACTERS)]
    look_back_seconds: Annotated[float, msgspec.Meta(ge=0, le=604_800)]
    timeout_seconds: Annotated[float, msgspec.Meta(ge=0, le=31_536_000)] | None


class ExpectEventResponse(msgspec.Struct, frozen=True):
    """When it has waited long enough."""

    expires_at: datetime | None


class ThrottleRequest(msgspec.Struct, frozen=True):
    """Take the next place of something that happens at a limited rate."""

    key: Annotated[str, msgspec.Meta(max_length=500)]
    limit: Annotated[int, msgspec.Meta(ge=1)]
    per_seconds: Annotated[float, msgspec.Meta(gt=0)]
    max_wait_seconds: Annotated[float, msgspec.Meta(ge=0)]


class ThrottleResponse(msgspec.Struct, frozen=True):
    """When that place is."""

    at: datetime
