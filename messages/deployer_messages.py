"""The messages that a deployer takes: a deployment is to be looked at, or what its pods have written is asked for."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, TypeAlias

QUEUE: Final = "deployments"
# Never renamed: an older deployer would put a message for an unknown actor among the dead letters.
ACTOR: Final = "deployments"
VERSION: Final = 1


@dataclass(frozen=True)
class ReconcileDeployment:
    """Something else may be wanted of a deployment than before."""

    workflow_id: str

    @property
    def key(self) -> str:
        """Of messages with the same key, one that lies there untaken is enough."""
        return self.workflow_id


@dataclass(frozen=True)
class ReadPodLogs:
    """Request for the last lines that pods have written: sent to `channel` as a direct message that names `asked`."""

    workflow_id: str
    limit: int
    channel: str
    asked: str

    @property
    def key(self) -> str:
        return self.asked


DeployerMessage: TypeAlias = ReconcileDeployment | ReadPodLogs


def reconcile_payload(workflow_id: str) -> str:
    """Return what whoever waits for a deployment watches, in the place of an execution's id."""
    return f"deployment:{workflow_id}"


def encode_message(message: DeployerMessage) -> dict[str, object]:
    """Return what goes over the wire."""
    return {"v": VERSION, **asdict(message)}


def parse_message(payload: Mapping[str, object]) -> DeployerMessage | None:
    """A payload of a version this deployer does not know says nothing: its sweep finds what it was about."""
    match payload:
        case {
            "v": 1,
            "workflow_id": str(workflow_id),
            "limit": int(limit),
            "channel": str(channel),
            "asked": str(asked),
        }:
            return ReadPodLogs(workflow_id, limit, channel, asked)
        case {"v": 1, "workflow_id": str(workflow_id)}:
            return ReconcileDeployment(workflow_id)
    return None
