"""Names of worker processes in leases: `worker:<name>/<process>`.

A worker keeps its name after a restart; the second part differs for each process, so that the leases of a
process differ from those of its successor.
"""

from __future__ import annotations

from typing import Final
from uuid import uuid4

WORKER_OWNER_PREFIX: Final = "worker:"
"""Prefix of the lease owner names of all workers."""
ALL_IN_ONE_OWNER: Final = "dev"
"""Prefix of the lease owner names of `pilotflame dev`, which does the duties of the scheduler too."""


def new_lease_owner(name: str) -> str:
    """Return a new, unique lease owner name, under which a worker process that starts now claims runs."""
    return f"{lease_owner_prefix(name)}{uuid4().hex}"


def lease_owner_prefix(name: str) -> str:
    """Return `worker:<name>/`, with which the lease owner names of all processes of a worker begin."""
    return f"{WORKER_OWNER_PREFIX}{name}/"
