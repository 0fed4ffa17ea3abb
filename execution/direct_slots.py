"""Slots of a worker that it grants to gateways, so that they assign runs to it as they accept them.

A worker grants only while nothing waits to be claimed, so that no run overtakes another one. It counts the runs of each
gateway: a grant names the last one that has arrived, and how many may follow it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

import structlog
from msgspec import Struct

from journal.store import ClaimedRun
from json_text import decoding
from messages.broker import SlotGrant

if TYPE_CHECKING:
    from messages.broker import DirectRuns

REMEMBERED_SECONDS: Final = 60.0
"""Time for which a gateway gets grants after its last run."""
MAX_SLOTS: Final = 50
"""Limit of one grant."""

_decode_runs = decoding.build_decoder(list[ClaimedRun]).decode

log = structlog.get_logger()


class KnownGateway(Struct):
    """Gateway whose runs this worker has executed."""

    seen_at: float
    """Time by the monotonic clock."""
    received: int = 0


class DirectSlots:
    """Grants of one worker."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._gateways: dict[str, KnownGateway] = {}

    def remember_gateways(self, runs: Iterable[ClaimedRun]) -> None:
        """Remember the gateways that accepted these claimed runs, for 60 seconds, so that they get grants of slots."""
        now = time.monotonic()
        for channel in {run.channel for run in runs if run.channel}:
            self._gateways.setdefault(channel, KnownGateway(now)).seen_at = now

    def receive(self, message: DirectRuns) -> list[ClaimedRun]:
        """Return the runs that a gateway has assigned by a message, in their form after a claim.

        An empty list, with a warning, for a message that can't be read or was received before, by its number.
        """
        gateway = self._gateways.setdefault(message.gateway, KnownGateway(0.0))
        gateway.seen_at = time.monotonic()
        if message.number <= gateway.received:
            log.warning("assigned runs repeated", gateway=message.gateway)
            return []
        gateway.received = message.number
        try:
            return _decode_runs(bytes(message.content))
        except ValueError as error:
            log.warning("assigned runs unreadable", gateway=message.gateway, error=str(error))
            return []

    def grant(self, free: int, channels: Iterable[str] | None = None) -> Mapping[str, SlotGrant]:
        """Return grants of slots by the channel of each known gateway: an equal share of the `free` slots, at most 50
        each.

        A grant lets a gateway assign so many runs, in place of its earlier grant; 0 if `free` is less than the number
        of gateways. With `channels`, only theirs. Gateways that were not seen for 60 seconds are forgotten.
        """
        oldest = time.monotonic() - REMEMBERED_SECONDS
        for channel in [name for name, one in self._gateways.items() if one.seen_at < oldest]:
            del self._gateways[channel]
        slots = min(max(free, 0) // max(len(self._gateways), 1), MAX_SLOTS)
        return {
            channel: SlotGrant(self._worker, self._gateways[channel].received, slots)
            for channel in (self._gateways if channels is None else channels)
            if channel in self._gateways
        }
