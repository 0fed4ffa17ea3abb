"""Messages to deployers: reconcile a deployment, or read the logs of its pods."""

from collections.abc import Mapping
from typing import Final, TypeAlias

from msgspec import Struct
from msgspec.structs import asdict

QUEUE: Final = "deployments"
# Never rename it: an older deployer would dead-letter a message for an unknown actor.
ACTOR: Final = "deployments"
VERSION: Final = 1
POD_LOGS: Final = "pod_logs"
"""Subject of answers to `PodLogRequest`: a key of the direct message."""


class ReconcileRequest(Struct, frozen=True):
    """Message that the desired state of a deployment may have changed."""

    workflow_id: str

    @property
    def key(self) -> str:
        """Deduplication key: the queue keeps one reconcile message per workflow."""
        return self.workflow_id


class PodLogRequest(Struct, frozen=True):
    """Request for the last log lines of pods. The answer is a direct message to `channel` that names `request_id`."""

    workflow_id: str
    limit: int
    channel: str
    request_id: str

    @property
    def key(self) -> str:
        """Deduplication key: the queue keeps every log request, since each has an id of its own."""
        return self.request_id


DeployerMessage: TypeAlias = ReconcileRequest | PodLogRequest


def encode_message(message: DeployerMessage) -> dict[str, object]:
    """Return the payload of a message for the queue: its fields, with the version of the format."""
    return {"v": VERSION, **asdict(message)}


def parse_message(payload: Mapping[str, object]) -> DeployerMessage | None:
    """Return the message of a payload, or None for an unknown version or form; the deployer's sweep then
    finds the change.
    """
    match payload:
        case {
            "v": 1,
            "workflow_id": str(workflow_id),
            "limit": int(limit),
            "channel": str(channel),
            "request_id": str(request_id),
        }:
            return PodLogRequest(workflow_id, limit, channel, request_id)
        case {"v": 1, "workflow_id": str(workflow_id)}:
            return ReconcileRequest(workflow_id)
    return None
