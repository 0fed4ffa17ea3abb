"""Documentation of operations beyond their types: headers, error codes and further statuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from msgspec import Struct, field
from msgspec.structs import replace

from engine.values import Json
from gateway.http import limits

if TYPE_CHECKING:
    from engine.values import Json

JSON: Final = "application/json"

EVENT_STREAM: Final = "text/event-stream"


class HeaderDoc(Struct, frozen=True):
    """Request or response header."""

    name: str
    description: str
    schema: Mapping[str, Json] = field(default_factory=lambda: {"type": "string"})
    is_always_sent: bool = True


class OtherSuccess(Struct, frozen=True):
    """Second success status of an operation: its condition, and the type of its body, if any."""

    meaning: str
    answer: object = None


class OperationDoc(Struct, frozen=True):
    """Headers, refusals and further statuses of one operation."""

    takes: Sequence[HeaderDoc] = ()
    sends: Sequence[HeaderDoc] = ()
    """Headers of the success response."""
    refusals: Sequence[str] = ()
    """Error codes besides those that follow from the route."""
    media_type: str = JSON
    stream: object = None
    """Type of the events of a `text/event-stream` that clients may request instead; None without one."""
    also: Mapping[int, OtherSuccess] = field(default_factory=dict)
    """Other success statuses."""

    def refusing(self, *codes: str) -> OperationDoc:
        """Return a copy of the documentation with further error codes that the operation answers."""
        return replace(self, refusals=(*self.refusals, *codes))


IDEMPOTENCY_KEY: Final = HeaderDoc(
    "Idempotency-Key",
    "Makes the request safe to repeat: for a day, the same key and body of the same user get the first answer again.",
    {"type": "string", "pattern": "^[!-~]+$", "minLength": 1, "maxLength": limits.IDEMPOTENCY_KEY_LENGTH},
)

PREFER: Final = HeaderDoc(
    "Prefer",
    "`wait=N`: answer when the run has ended, or after N seconds, at most 60, with its state by then. Needs the scope"
    " `workflows:read`, and is ignored without it.",
)

PREFERENCE_APPLIED: Final = HeaderDoc(
    "Preference-Applied", "`wait=N`: the wait that was applied.", is_always_sent=False
)

IF_MATCH: Final = HeaderDoc(
    "If-Match",
    "`ETag` of the state to change. If the object has changed since, the request is refused with 412.",
)

IF_NONE_MATCH: Final = HeaderDoc("If-None-Match", "`ETag` of the copy that the client already has.")

LAST_EVENT_ID: Final = HeaderDoc(
    "Last-Event-ID", "Id of the last event that the client received, or `end`: the stream resumes after it."
)

ETAG: Final = HeaderDoc("ETag", "Identifies the object's state, for a later `If-Match`.")

REPLAYED: Final = HeaderDoc(
    "Idempotent-Replayed",
    "`true` if this is the answer to an earlier request with the same `Idempotency-Key`.",
    {"type": "string", "const": "true"},
    is_always_sent=False,
)

SERVER_TIMING: Final = HeaderDoc(
    "Server-Timing",
    "Durations: `accept`, to store the execution; `wake`, until a pod claimed it; `run`, until this answer.",
)

COLD_START: Final = HeaderDoc(
    "X-Cold-Start",
    "Whether the workflow's pods had to be started.",
    {"type": "string", "enum": ["true", "false"]},
)

LOCATION: Final = HeaderDoc("Location", "URL of the execution.")

RATES: Final = (
    HeaderDoc(
        "RateLimit-Policy",
        "Limits of the request: a quota of `q` requests, restored within `w` seconds.",
        is_always_sent=False,
    ),
    HeaderDoc(
        "RateLimit",
        "Remaining quota: `r` requests are left; the whole quota is restored after `t` seconds.",
        is_always_sent=False,
    ),
)
"""Response headers of operations with rate limits."""

ALLOW: Final = HeaderDoc("Allow", "Methods of the path.")

ALLOWED_ORIGIN: Final = HeaderDoc(
    "WebHook-Allowed-Origin",
    "The `WebHook-Request-Origin` of the request, which may send events.",
    is_always_sent=False,
)

ALLOWED_RATE: Final = HeaderDoc(
    "WebHook-Allowed-Rate", "Permitted requests per minute; `*` means no limit.", is_always_sent=False
)

DISPOSITION: Final = HeaderDoc("Content-Disposition", "Suggested file name.")

KEPT: Final = OperationDoc(
    takes=(IF_NONE_MATCH,),
    sends=(replace(ETAG, description="Identifies this text, for a later `If-None-Match`."),),
    also={304: OtherSuccess("The client already has the current text.")},
)

TAGGED: Final = OperationDoc(sends=(ETAG,))

EDITS: Final = OperationDoc(
    takes=(IF_MATCH,),
    sends=(ETAG,),
    refusals=("not-owner", "precondition-failed", "edit-conflict", "validation-failed"),
)

EDITS_WORKFLOW: Final = EDITS.refusing("unresolved-model-placeholder")

CREATES: Final = OperationDoc(
    takes=(IDEMPOTENCY_KEY,),
    sends=(replace(ETAG, is_always_sent=False), REPLAYED),
    refusals=("invalid-idempotency-key", "idempotency-mismatch"),
)

ENDED: Final = "With `Prefer: wait=N`: the run has ended, in any status."

TAKES_IN: Final = OperationDoc(
    takes=(IDEMPOTENCY_KEY,),
    sends=(LOCATION, REPLAYED, *RATES),
    refusals=(
        "queue-full",
        "invalid-idempotency-key",
        "idempotency-mismatch",
        "workflow-paused",
        "workflow-archived",
        "workflow-changed",
        "unresolved-model-placeholder",
        "model-not-usable",
    ),
)

ARRIVES: Final = OperationDoc(
    sends=(LOCATION, REPLAYED),
    refusals=(
        *("workflow-changed", "workflow-not-active", "concurrency-limit"),
        "unresolved-model-placeholder",
    ),
)
