"""Polls of task workers, and their answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from engine.node_api import parse_version
from models.access import ApiCaller


class ClaimedTask(msgspec.Struct):
    """Task that a worker holds."""

    id: str
    lease: str
    lease_microseconds: int
    deadline_at: int
    type: str
    version: str
    execution_id: str
    node_id: str
    key: str
    config: str
    input: str | None
    input_bytes: int
    checkpoint: str | None
    failures: int
    losses: int
    is_acknowledged: bool
    worker_id: str
    claim_id: str
    state: str
    organization_id: str
    queue_turn: int
    claimed_at: int
    fence: int
    """Number of claims and repetitions of claims of the task."""

    @property
    def attempt(self) -> int:
        return self.failures + self.losses + 1

    @property
    def size(self) -> int:
        """Approximate characters that the task takes in the answer to a claim."""
        return 1_000 + len(self.config) + len(self.input or "") + len(self.checkpoint or "")


class TaskPoll(msgspec.Struct, frozen=True):
    """Poll of a worker for tasks."""

    organization_id: str
    worker_id: str
    request_id: str
    limit: int
    versions: Mapping[str, str]
    """Version of each type that the worker performs."""
    pools: frozenset[str]
    viewer: ApiCaller | None = None
    """Caller whose visible runs alone it performs; None for all runs of the organization."""

    @property
    def viewer_id(self) -> str:
        """Id of the user whose visible runs it performs; empty for all runs."""
        return "" if self.viewer is None else self.viewer.user_id

    @property
    def service_group(self) -> tuple[object, ...]:
        """Organization, types, pools and viewer: polls with equal ones get the same tasks."""
        return self.organization_id, tuple(sorted(self.versions.items())), self.pools, self.viewer_id

    def serves(self, queue: str) -> bool:
        """Return whether the worker performs the tasks of a queue: of its types and pools, and of a version with the
        same major number that is not newer than its own.
        """
        name, _, rest = queue.partition("@")
        version, _, pool = rest.partition("#")
        own = self.versions.get(name)
        if own is None or pool not in self.pools:
            return False
        return is_served(version, own)


def is_served(wanted: str, own: str) -> bool:
    """Return whether a worker with code of version `own` performs tasks of version `wanted`: of the same
    major version, and not newer than `own`.
    """
    asked, offered = parse_version(wanted), parse_version(own)
    return asked[:1] == offered[:1] and asked <= offered


class OrganizationNews(msgspec.Struct):
    """News for the polls of an organization."""

    repeated: dict[tuple[str, str], list[ClaimedTask]]
    """Tasks that a claim has leased before, by its worker and request: the poll is a repetition."""
    leaving: dict[str, bool]
    """Workers that stop (true), or that an operator has asked to stop (false)."""
    cancelling: list[tuple[str, str]]
    """Worker and task of each requested cancellation."""
    queues: list[str]
    """Queues with tasks to claim."""
    limited_keys: list[str]
    """Concurrency keys with tasks that wait for a place."""


class Claim(msgspec.Struct):
    """Tasks for polls, in the order of these."""

    tasks: list[list[ClaimedTask]]
    has_more: bool = False
    """Whether there may be more tasks: another claim should follow."""
    missed: int = 0
    """Number of tasks that claims of other gateways had locked; those may leave some of them."""

    @property
    def count(self) -> int:
        return sum(map(len, self.tasks))


CLAIMED_COLUMNS: Final = ClaimedTask.__struct_fields__
