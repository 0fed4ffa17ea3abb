"""Names of workers in leases: `worker:<name>/<process>`.

A worker keeps its name when it is started again; the second part differs for each process, so that what a process held
can be told from what its successor holds.
"""

from __future__ import annotations

from typing import Final
from uuid import uuid4

WORKER_OWNER_PREFIX: Final = "worker:"
"""How the names of all workers begin."""


def new_lease_owner(name: str) -> str:
    """Return the name in the leases of a process that has just begun."""
    return f"{lease_owner_prefix(name)}{uuid4().hex}"


def lease_owner_prefix(name: str) -> str:
    """Return how the names of all processes of a worker begin."""
    return f"{WORKER_OWNER_PREFIX}{name}/"
