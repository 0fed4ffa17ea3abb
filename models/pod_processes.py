"""Names of pod processes in leases: `pod:<workflow>:<pod>/<start>`.

A pod may restart under its name, and nobody renews the leases of its earlier process. So a name identifies
one process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

POD_OWNER_PREFIX: Final = "pod:"
"""Prefix of the lease owner names of all pods."""
_NAME: Final = re.compile(r"(?P<pod>[A-Za-z0-9_-]{1,64})/(?P<milliseconds>[0-9]{13})")


@dataclass(frozen=True, slots=True)
class PodProcess:
    """One process of a pod."""

    pod: str
    started_at: datetime
    """Start time by the clock of its machine, in whole milliseconds."""

    @classmethod
    def new(cls, pod: str) -> PodProcess:
        """Return the identity of a process that starts now."""
        return cls(pod, datetime.fromtimestamp(int(datetime.now(UTC).timestamp() * 1_000) / 1_000, UTC))  # noqa: TID251 - compared on one machine

    @classmethod
    def from_name(cls, name: str) -> PodProcess | None:
        """Parse a process from its name; None for any other text."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        return cls(found["pod"], datetime.fromtimestamp(int(found["milliseconds"]) / 1_000, UTC))

    @property
    def name(self) -> str:
        return f"{self.pod}/{round(self.started_at.timestamp() * 1_000):013d}"


def lease_owner(workflow_id: str, process: PodProcess) -> str:
    """Return the name under which a process leases runs.

    Only pods of its workflow have names with this prefix.
    """
    return f"{lease_owner_prefix(workflow_id)}{process.name}"


def lease_owner_prefix(workflow_id: str) -> str:
    """Return the common prefix of the lease owner names of a workflow's pods."""
    return f"{POD_OWNER_PREFIX}{workflow_id}:"
