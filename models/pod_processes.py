"""By what names pods hold runs: `pod:<workflow>:<pod>/<start>`.

A pod may be started again under its name, and what it held before is nobody's then: so a name is that of one process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

POD_OWNER_PREFIX: Final = "pod:"
"""How the names of all pods begin."""
_NAME: Final = re.compile(r"(?P<pod>[A-Za-z0-9_-]{1,64})/(?P<milliseconds>[0-9]{13})")


@dataclass(frozen=True, slots=True)
class PodProcess:
    """One process of a pod."""

    pod: str
    started_at: datetime
    """By the clock of the machine that it runs on, in whole milliseconds."""

    @classmethod
    def new(cls, pod: str) -> PodProcess:
        """Return the process that has just begun."""
        return cls(pod, datetime.fromtimestamp(int(datetime.now(UTC).timestamp() * 1_000) / 1_000, UTC))  # noqa: TID251 - compared on one machine

    @classmethod
    def from_name(cls, name: str) -> PodProcess | None:
        """Return the process of a name; None for what is none."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        return cls(found["pod"], datetime.fromtimestamp(int(found["milliseconds"]) / 1_000, UTC))

    @property
    def name(self) -> str:
        return f"{self.pod}/{round(self.started_at.timestamp() * 1_000):013d}"


def lease_owner(workflow_id: str, process: PodProcess) -> str:
    """Return by what name a process leases runs: nobody but pods of its workflow has one that begins like it."""
    return f"{lease_owner_prefix(workflow_id)}{process.name}"


def lease_owner_prefix(workflow_id: str) -> str:
    """Return how the names of all pods of a workflow begin."""
    return f"{POD_OWNER_PREFIX}{workflow_id}:"
