"""Request and response bodies of `/internal/v1/…`, the API with which pods replace database access.

Every call carries `Authorization: Bearer` with the token of its deployment. `X-Runner` carries the name of
the pod and the start time of its process, `<pod>/<milliseconds since 1970>`: the two together hold the
leases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Final

import msgspec

from engine.agents.agent_steps import AgentStep
from engine.model_calls import FailedModelCall, ModelReservation, ModelSettlement
from engine.run_records import NodeSpan
from execution.live_answers import AnswerPiece
from journal.store import ClaimedRun, RunWrite
from models.loss_limits import MAX_ISOLATION_LOSSES

PREFIX: Final = "/internal/v1"
RUNNER_HEADER: Final = "X-Runner"
NODE_ERROR_HEADER: Final = "X-Node-Error"
"""Header of refusals that the node itself should see: `final` or `retryable`."""
RETRYABLE: Final = "retryable"
FINAL: Final = "final"

MAX_CLAIM: Final = 50
MAX_WRITES: Final = 200
MAX_PIECES: Final = 100
"""Pieces of answers in one call."""
MAX_RUNS: Final = 10_000
"""Maximum number of runs that one pod holds."""
MAX_LEASE_SECONDS: Final = 600.0
MAX_WAIT_SECONDS: Final = 25.0
MAX_RECORD_BYTES: Final = 80_000_000
"""A run commits once it has 10 MB to record, or a single output of up to 50 MB; Base64 adds a third."""
SPANS_PER_PAGE: Final = 200
STEPS_PER_PAGE: Final = 100
MAX_FILTER_CHARACTERS: Final = 65_536

LeaseSeconds = Annotated[float, msgspec.Meta(gt=0, le=MAX_LEASE_SECONDS)]
Ids = Annotated[list[str], msgspec.Meta(max_length=MAX_RUNS)]


class ServerDatabaseAddress(msgspec.Struct, frozen=True):
    """Address of the server's own database, which no data source may reach."""

    host: str
    port: int
    database: str


class PodContact(msgspec.Struct, frozen=True):
    """Response to the first call of a pod: its deployment and definition."""

    organization_id: str
    shard: int
    definition_hash: str
    definition: str
    own_database: ServerDatabaseAddress | None
    """None if the database is a file, which no address reaches."""
    is_stopped: bool = False
    """Whether pods of the deployment are to exit; the time for their runs to end is over."""
    now: datetime | None = None
    """Time of the database; None from a gateway of an earlier version."""


class WorkPollRequest(msgspec.Struct, frozen=True):
    """Wait for work, if the pod has capacity, or for a control request to a run that it holds."""

    seconds: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT_SECONDS)]
    wants_work: bool
    heard: Mapping[str, str] = {}
    """Control requests that the pod knows of: `stop` or `cancel`, by execution id."""
    run_counts: Mapping[str, int] = msgspec.field(default_factory=dict, name="arrivals")
    """Last known `run_count` by gateway. The poll returns at once on another number, even if it wants no work.
    """


class WorkPollResponse(msgspec.Struct, frozen=True):
    """Result of a work poll; empty after its timeout."""

    has_work: bool = False
    requests: Mapping[str, str] = {}
    gateway: str = ""
    run_count: int = msgspec.field(default=0, name="arrivals")
    """Number of runs, or batches of them, that this gateway has accepted for the deployment."""


class OpenAnswersRequest(msgspec.Struct, frozen=True):
    """Pieces of open answers of models, best effort, and the question whether a client follows a run."""

    open: Annotated[list[str], msgspec.Meta(max_length=MAX_RUNS)] = []
    """Executions with open answers."""
    pieces: Annotated[list[AnswerPiece], msgspec.Meta(max_length=MAX_PIECES)] = []


class OpenAnswersResponse(msgspec.Struct, frozen=True):
    """Executions of the request that a client follows."""

    followed: Sequence[str] = ()
    repeated: Sequence[str] = ()
    """Those with a lost piece, whose open answers are needed from their beginning."""


class ClaimRequest(msgspec.Struct, frozen=True):
    """Claim the best pending runs."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_CLAIM)]
    lease_seconds: LeaseSeconds
    is_trial: bool = False
    """Whether to claim suspects only."""
    max_isolation_losses: Annotated[int, msgspec.Meta(ge=0, le=MAX_ISOLATION_LOSSES)] = MAX_ISOLATION_LOSSES


class ClaimResponse(msgspec.Struct, frozen=True):
    """Claimed runs."""

    runs: Sequence[ClaimedRun]


class SuspectsRequest(msgspec.Struct, frozen=True):
    """Search for suspects of this deployment."""

    max_isolation_losses: Annotated[int, msgspec.Meta(ge=0, le=MAX_ISOLATION_LOSSES)]


class SuspectsResponse(msgspec.Struct, frozen=True):
    """Presence of suspects of this deployment."""

    has_suspects: bool


class RecordRequest(msgspec.Struct, frozen=True):
    """Record the progress of runs; idempotent."""

    writes: Annotated[list[RunWrite], msgspec.Meta(max_length=MAX_WRITES)]


class RecordResponse(msgspec.Struct, frozen=True):
    """Runs with valid fencing tokens."""

    held: Sequence[str]
    unwritten: Sequence[str] = ()
    """Runs whose rows another transaction has locked."""


class LeaseIdentity(msgspec.Struct, frozen=True):
    """Lease to renew."""

    execution_id: str
    shard: int
    token: int


class RenewRequest(msgspec.Struct, frozen=True):
    """Renew leases."""

    leases: Annotated[list[LeaseIdentity], msgspec.Meta(max_length=MAX_RUNS)]
    lease_seconds: LeaseSeconds


class RenewResponse(msgspec.Struct, frozen=True):
    """Renewed leases, with the control request of each run."""

    requests: Mapping[str, str | None]
    locked: Sequence[str] = ()
    """Runs whose leases were neither renewed nor lost."""
    now: datetime | None = None
    """Time of the database; None from a gateway of an earlier version."""


class ReleaseRequest(msgspec.Struct, frozen=True):
    """Release runs that the database assigns to this pod, but that it never began."""

    held: Ids


class CountResponse(msgspec.Struct, frozen=True):
    """Number of rows that a call has changed."""

    count: int


class DefinitionsRequest(msgspec.Struct, frozen=True):
    """Read the definitions that runs of this pod were accepted with."""

    hashes: Annotated[list[str], msgspec.Meta(max_length=MAX_CLAIM)]


class DefinitionsResponse(msgspec.Struct, frozen=True):
    """Definitions by their hashes."""

    texts: Mapping[str, str]


class RunsRequest(msgspec.Struct, frozen=True):
    """Read data of runs that this pod holds."""

    execution_ids: Ids


class SpansRequest(msgspec.Struct, frozen=True):
    """Read a page of the recorded spans of one run."""

    execution_id: str
    after: int = 0
    """Sequence number of the last span of the previous page."""
    reads_candidates: bool = False
    """Whether the pod knows candidates of replays; pods of 0.2.0 do not."""


class SpansResponse(msgspec.Struct, frozen=True):
    """Page of spans; another page may follow a full one."""

    spans: Sequence[NodeSpan]


class StepsRequest(msgspec.Struct, frozen=True):
    """Read a page of the recorded steps of the agents of one run that have not ended."""

    execution_id: str
    after: int = 0
    """Sequence number of the last step of the previous page."""


class StepsResponse(msgspec.Struct, frozen=True):
    """Page of steps in the order of their sequence numbers; another page may follow a full one."""

    steps: Sequence[AgentStep]


class LogPositions(msgspec.Struct, frozen=True):
    """Highest sequence number in each run's log."""

    last_lines: Mapping[str, int]


class NodeAnswerRecord(msgspec.Struct, frozen=True):
    """Wait answer of a node."""

    execution_id: str
    node_id: str
    iteration: str
    payload: bytes


class NodeAnswersResponse(msgspec.Struct, frozen=True):
    """Wait answers of the requested runs."""

    answers: Sequence[NodeAnswerRecord]


class DataSourceRequest(msgspec.Struct, frozen=True):
    """Open a data source for a run that this pod holds."""

    source_id: Annotated[str, msgspec.Meta(max_length=64)]


class ModelRequest(msgspec.Struct, frozen=True):
    """Look up a language model for a run that this pod holds."""

    model_id: Annotated[str, msgspec.Meta(max_length=64)]


class ModelBlockRequest(msgspec.Struct, frozen=True):
    """Note that the provider of a language model accepts no calls for a time, by its answer to this pod."""

    model_id: Annotated[str, msgspec.Meta(max_length=64)]
    seconds: Annotated[float, msgspec.Meta(ge=0)]


class ModelReserveRequest(msgspec.Struct, frozen=True):
    """Reserve the highest cost of a call of a language model, for a run that this pod holds; idempotent."""

    reservation: ModelReservation


class ModelSettleRequest(msgspec.Struct, frozen=True):
    """Settle a call of a language model that has been answered; idempotent."""

    settlement: ModelSettlement


class ModelReleaseRequest(msgspec.Struct, frozen=True):
    """Remove the reservation of a call of a language model that its provider has refused; idempotent."""

    key: Annotated[str, msgspec.Meta(max_length=500)]


class ModelFailureRequest(msgspec.Struct, frozen=True):
    """Count a call of a language model that its provider has not answered."""

    failed: FailedModelCall


class StartRunRequest(msgspec.Struct, frozen=True):
    """Start a sub-workflow run for a node of a run that this pod holds; idempotent."""

    workflow_id: str
    inputs: msgspec.Raw
    node_id: str
    iteration: str
    awaited: bool
    write_key_id: str = ""
    """Execution in the idempotency keys of the node, if it repeats a request of an earlier run; else empty."""
    is_tainted: bool = False
    """Whether text of outsiders may be in `inputs`; the run is tainted too if the run that starts it is."""
    is_read_only: bool = False
    """Whether a workflow that writes is refused."""


class WorkflowEffectRequest(msgspec.Struct, frozen=True):
    """Ask whether a run of a workflow may write."""

    workflow_id: Annotated[str, msgspec.Meta(max_length=64)]


class WorkflowEffectResponse(msgspec.Struct, frozen=True):
    """Effect of a workflow as it is now."""

    may_write: bool


class StartRunResponse(msgspec.Struct, frozen=True):
    """Identity of the started run."""

    execution_id: str


class ApprovalLinksRequest(msgspec.Struct, frozen=True):
    """Create links to questions of a run that this pod holds; idempotent."""

    places: Annotated[Sequence[tuple[str, str]], msgspec.Meta(max_length=100)]
    """Ids and iterations of the nodes that ask."""


class ApprovalLinksResponse(msgspec.Struct, frozen=True):
    """URLs in the order of the request."""

    urls: Sequence[str]


class CallbackUrlRequest(msgspec.Struct, frozen=True):
    """Create the callback URL of a node of a run that this pod holds; idempotent."""

    node_id: Annotated[str, msgspec.Meta(max_length=64)]
    iteration: Annotated[str, msgspec.Meta(max_length=200)]


class CallbackUrlResponse(msgspec.Struct, frozen=True):
    """Callback URL of a node."""

    url: str


class SignatureRequest(msgspec.Struct, frozen=True):
    """Sign a request of a node of a run that this pod holds with the secrets of its organization."""

    message_id: Annotated[str, msgspec.Meta(max_length=100)]
    body: bytes


class SignatureResponse(msgspec.Struct, frozen=True):
    """Headers that sign a request."""

    headers: Mapping[str, str]


class ExpectEventRequest(msgspec.Struct, frozen=True):
    """Register a node of a run that this pod holds as waiting for an event; idempotent."""

    node_id: Annotated[str, msgspec.Meta(max_length=64)]
    iteration: Annotated[str, msgspec.Meta(max_length=200)]
    event_type: Annotated[str, msgspec.Meta(pattern=r"^[^\s*]{1,200}(\.\*)?\Z")]
    condition: Annotated[str, msgspec.Meta(max_length=MAX_FILTER_CHARACTERS)] | None
    given: Annotated[str, msgspec.Meta(max_length=MAX_FILTER_CHARACTERS)]
    look_back_seconds: Annotated[float, msgspec.Meta(ge=0, le=604_800)]
    timeout_seconds: Annotated[float, msgspec.Meta(ge=0, le=31_536_000)] | None


class ExpectEventResponse(msgspec.Struct, frozen=True):
    """Time at which the wait expires."""

    expires_at: datetime | None


class ExpectSignalRequest(msgspec.Struct, frozen=True):
    """Register a node of a run that this pod holds as waiting for a signal; idempotent."""

    node_id: Annotated[str, msgspec.Meta(max_length=64)]
    iteration: Annotated[str, msgspec.Meta(max_length=200)]
    name: Annotated[str, msgspec.Meta(max_length=64)]
    timeout_seconds: Annotated[float, msgspec.Meta(ge=0, le=31_536_000)] | None


class ReplyToSignalRequest(msgspec.Struct, frozen=True):
    """Reply to the signal that a node of a run that this pod holds has received; idempotent."""

    node_id: Annotated[str, msgspec.Meta(max_length=64)]
    iteration: Annotated[str, msgspec.Meta(max_length=200)]
    value: bytes
    """JSON."""


class ReplyToSignalResponse(msgspec.Struct, frozen=True):
    """Confirmation that the reply is stored."""


class PublishRequest(msgspec.Struct, frozen=True):
    """Publish a value in the state of a run that this pod holds; idempotent."""

    key: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,39}\Z")]
    value: bytes
    """JSON."""


class PublishResponse(msgspec.Struct, frozen=True):
    """Confirmation that the value is stored."""


class ThrottleRequest(msgspec.Struct, frozen=True):
    """Reserve the next slot of a shared rate limit."""

    key: Annotated[str, msgspec.Meta(max_length=500)]
    limit: Annotated[int, msgspec.Meta(ge=1)]
    per_seconds: Annotated[float, msgspec.Meta(gt=0)]
    max_wait_seconds: Annotated[float, msgspec.Meta(ge=0)]


class ThrottleResponse(msgspec.Struct, frozen=True):
    """Time of the reserved slot."""

    at: datetime
