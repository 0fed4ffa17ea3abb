"""What the document says of an operation besides its line in the table: headers, and the refusals of its own.

A test holds these to what the handlers do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from gateway import limits
from gateway.endpoints import (
    access,
    copies,
    document,
    execute,
    executions,
    graph,
    health,
    nodes,
    sharing,
    validation,
    versions,
    workflows,
)

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.endpoint import Handler

JSON: Final = "application/json"


@dataclass(frozen=True, slots=True)
class Header:
    """A header that is read, or sent."""

    name: str
    description: str
    schema: Mapping[str, Json] = field(default_factory=lambda: {"type": "string"})
    is_always_sent: bool = True


@dataclass(frozen=True, slots=True)
class Also:
    """Another success than the usual one: when it is, and the type of its body, if it has one."""

    meaning: str
    answer: object = None


@dataclass(frozen=True, slots=True)
class Note:
    """What is true of an operation."""

    takes: Sequence[Header] = ()
    sends: Sequence[Header] = ()
    """With the answer of success."""
    refusals: Sequence[str] = ()
    """Codes besides those that follow from the operation's line."""
    media_type: str = JSON
    also: Mapping[int, Also] = field(default_factory=dict)
    """Other statuses of success."""

    def refusing(self, *codes: str) -> Note:
        """Return this with further codes."""
        return replace(self, refusals=(*self.refusals, *codes))


@dataclass(frozen=True, slots=True)
class Place:
    """What a name in a path stands for, told by the word before it."""

    description: str
    example: str
    schema: Mapping[str, Json] = field(
        default_factory=lambda: {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
    )


PLACES: Final[Mapping[str, Place]] = {
    "keys": Place("Id of the key.", "key_abc123"),
    "workflows": Place("Id of the workflow.", "wf_abc123"),
    "nodes": Place("Id of the node in the workflow.", "node-xyz123"),
    "connections": Place("Id of the connection in the workflow.", "conn-abc123"),
    "versions": Place("Number of the version, from 1 on; where two are compared, or `current`.", "1"),
    "diff": Place("Number of the version to compare it with, or `current`.", "current"),
    "share": Place("Id of the user.", "user_789"),
    "workflow-nodes": Place("Name of the node type.", "http-request"),
    "executions": Place("Id of the execution.", "exec_xyz789"),
}

IDEMPOTENCY_KEY: Final = Header(
    "Idempotency-Key",
    "Makes the request safe to repeat: for a day, the same key and body of the same user get the first answer again.",
    {"type": "string", "pattern": "^[!-~]+$", "minLength": 1, "maxLength": limits.IDEMPOTENCY_KEY_LENGTH},
)
IF_MATCH: Final = Header(
    "If-Match", "The `ETag` of the state that the change is meant for; in any other it is refused with 412."
)
IF_NONE_MATCH: Final = Header("If-None-Match", "The `ETag` of what the client has already.")
LAST_EVENT_ID: Final = Header(
    "Last-Event-ID", "The id of the last event that was seen, or `end`: the stream goes on behind it."
)
ETAG: Final = Header("ETag", "Names the workflow's state, for a later `If-Match`.")
REPLAYED: Final = Header(
    "Idempotent-Replayed",
    "`true` where the answer is that of an earlier request with the same `Idempotency-Key`.",
    {"type": "string", "const": "true"},
    is_always_sent=False,
)
LOCATION: Final = Header("Location", "Where the execution is to be found.")
DISPOSITION: Final = Header("Content-Disposition", "A name for the file.")

KEPT: Final = Note(
    takes=(IF_NONE_MATCH,),
    sends=(replace(ETAG, description="Names this text, for a later `If-None-Match`."),),
    also={304: Also("The client has it already.")},
)
TAGGED: Final = Note(sends=(ETAG,))
EDITS: Final = Note(
    takes=(IF_MATCH,),
    sends=(ETAG,),
    refusals=("not-owner", "precondition-failed", "edit-conflict", "validation-failed"),
)
CREATES: Final = Note(
    takes=(IDEMPOTENCY_KEY,),
    sends=(replace(ETAG, is_always_sent=False), REPLAYED),
    refusals=("invalid-idempotency-key", "idempotency-mismatch"),
)

NOTES: Final[Mapping[Handler, Note]] = {
    health.ready: Note(refusals=("not-ready",)),
    document.openapi: KEPT,
    document.page: replace(KEPT, media_type="text/html"),
    access.create_key: Note(refusals=("not-found",)),
    access.create_user: Note(refusals=("email-taken",)),
    workflows.create: CREATES,
    workflows.show: TAGGED,
    workflows.update: EDITS,
    workflows.set_status: EDITS,
    workflows.delete: replace(EDITS, sends=()).refusing("workflow-running"),
    execute.start: Note(
        takes=(IDEMPOTENCY_KEY,),
        sends=(LOCATION, REPLAYED),
        refusals=(
            "invalid-idempotency-key",
            "idempotency-mismatch",
            "workflow-paused",
            "workflow-archived",
            "workflow-changed",
        ),
    ),
    copies.duplicate: CREATES,
    copies.use_template: CREATES.refusing("not-found"),
    copies.save_as_template: CREATES.refusing("admin-required"),
    copies.export_workflow: Note(sends=(ETAG, DISPOSITION)),
    copies.import_workflow: replace(
        CREATES, also={200: Also("Without `references`: what there is to resolve.", copies.ImportAnswer)}
    ),
    graph.build: replace(CREATES, also={200: Also("With `dryRun`: what is wrong.", graph.BuildFindings)}),
    graph.layout: EDITS,
    validation.check: TAGGED,
    validation.compute_scopes: EDITS,
    nodes.index: TAGGED,
    nodes.add: EDITS.refusing("duplicate-node-id"),
    nodes.configure: EDITS.refusing("duplicate-node-id"),
    nodes.remove: EDITS,
    nodes.set_mappings: EDITS.refusing("duplicate-node-id"),
    nodes.set_pass_through: EDITS.refusing("duplicate-node-id"),
    nodes.connect: EDITS.refusing("duplicate-connection"),
    nodes.disconnect: EDITS,
    versions.index: TAGGED,
    versions.show: TAGGED,
    versions.compare: TAGGED,
    versions.create: EDITS.refusing("version-tag-taken", "too-many-versions"),
    versions.restore: EDITS,
    sharing.index: TAGGED,
    sharing.add: EDITS.refusing("too-many-shares"),
    sharing.remove: EDITS,
    sharing.set_visibility: EDITS.refusing("admin-required"),
    executions.events: Note(
        takes=(LAST_EVENT_ID,),
        media_type="text/event-stream",
        also={204: Also("The client has seen the end of this stream.")},
        refusals=("invalid-last-event-id",),
    ),
    executions.resume: Note(
        sends=(LOCATION,),
        refusals=("execution-not-failed", "workflow-deleted", "workflow-paused", "workflow-archived"),
    ),
}
