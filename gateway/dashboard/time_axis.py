"""Time axis of a run in percent of its width: long waits are folded, everything else has one scale."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Final, TypeAlias

from msgspec import Struct

Interval: TypeAlias = tuple[datetime, datetime]
"""Start and end of work; both are the same for an event without a length."""

WHOLE: Final = 100.0
FOLDED_SHARE: Final = 0.12
"""Share of the axis that a folded wait takes, unless there are more than four."""
MIN_FOLDED_SECONDS: Final = 2.0
FOLDED_FACTOR: Final = 0.5
"""A gap is folded if it lasts longer than this part of all work."""
MIN_LENGTH: Final = timedelta(milliseconds=1)
TICK_SHARE: Final = 18.0
"""Percentage of the axis between two ticks, at least."""
STEPS: Final = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500),
    *(1_000, 2_000, 5_000, 10_000, 15_000, 30_000),
    *(60_000, 120_000, 300_000, 600_000, 1_800_000),
    *(3_600_000, 7_200_000, 21_600_000, 43_200_000, 86_400_000),
)
"""Milliseconds between two ticks that people read easily."""


class FoldedWait(Struct, frozen=True):
    """Part of the axis in which nothing ran, drawn shorter than it was."""

    x: float
    width: float
    milliseconds: int


class AxisTick(Struct, frozen=True):
    """Labeled point of the axis."""

    x: float
    milliseconds: int
    """Time since the start of the run."""


class _Piece(Struct, frozen=True):
    """Part of the axis with one scale: bounds in time and in percent."""

    start: datetime
    end: datetime
    x: float
    width: float
    is_folded: bool

    def percent(self, moment: datetime) -> float:
        """Return the position of a time within this piece, in percent of the whole axis."""
        length = self.end - self.start
        share = (moment - self.start) / length if length else 0.0
        return self.x + self.width * min(max(share, 0.0), 1.0)


class TimeAxis(Struct, frozen=True):
    """Map from times to percent."""

    pieces: Sequence[_Piece]

    @classmethod
    def build(cls, start: datetime, end: datetime, work: Iterable[Interval]) -> TimeAxis:
        """Return the axis from `start` to `end`, on which long gaps between the intervals of `work` are folded, that
        is, drawn short.

        A gap is long if it lasts over two seconds and half of the total work. Folded gaps take at most 48 percent of
        the axis together.
        """
        end = max(end, start + MIN_LENGTH)
        busy = _merge(start, end, work)
        total = sum(((last - first) for first, last in busy), timedelta())
        longest = max(MIN_FOLDED_SECONDS, total.total_seconds() * FOLDED_FACTOR)
        edges = [start, *(edge for interval in busy for edge in interval), end]
        gaps = [
            (first, last)
            for first, last in zip(edges[::2], edges[1::2], strict=True)
            if (last - first).total_seconds() > longest
        ]
        share = FOLDED_SHARE * WHOLE * min(1.0, 4 / max(len(gaps), 1))
        plain = (end - start) - sum(((last - first) for first, last in gaps), timedelta())
        scale = (WHOLE - share * len(gaps)) / plain.total_seconds() if plain else 0.0
        bounds = [start, *(edge for gap in gaps for edge in gap), end]
        pieces, x = [], 0.0
        for number, (first, last) in enumerate(pairwise(bounds)):
            is_folded = number % 2 == 1
            width = share if is_folded else (last - first).total_seconds() * scale
            pieces.append(_Piece(first, last, x, width, is_folded))
            x += width
        return cls(pieces)

    def percent(self, moment: datetime) -> float:
        """Return the position of a time on the axis, 0 to 100; times outside of it are at its ends."""
        number = bisect_left(self.pieces, moment, key=lambda piece: piece.end)
        return self.pieces[min(number, len(self.pieces) - 1)].percent(moment)

    def list_folds(self) -> list[FoldedWait]:
        """Return the folded waits with position and width in percent, and their true duration in milliseconds."""
        return [
            FoldedWait(round(piece.x, 2), round(piece.width, 2), _to_milliseconds(piece.end - piece.start))
            for piece in self.pieces
            if piece.is_folded
        ]

    def list_ticks(self) -> list[AxisTick]:
        """Return ticks at round times before the first fold: position in percent and milliseconds since the start."""
        first, start = self.pieces[0], self.pieces[0].start
        length = _to_milliseconds(first.end - first.start)
        ticks = [AxisTick(0.0, 0)]
        step = _round_step(length * TICK_SHARE / first.width) if first.width else 0
        # The length of a fold is written around its middle, and is wider than the fold.
        margin = TICK_SHARE if len(self.pieces) > 1 else TICK_SHARE / 2
        for number in range(1, length // step + 1 if step else 1):
            x = first.percent(start + timedelta(milliseconds=number * step))
            if x <= first.width - margin:
                ticks.append(AxisTick(round(x, 2), number * step))
        return ticks


def _merge(start: datetime, end: datetime, work: Iterable[Interval]) -> list[Interval]:
    """Return the intervals of work cut to the bounds, sorted; those that touch or overlap become one."""
    merged: list[Interval] = []
    for first, last in sorted(work):
        begin, stop = max(first, start), min(last, end)
        if stop < begin:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((begin, stop))
    return merged


def _round_step(milliseconds: float) -> int:
    """Return the first round time in milliseconds that is at least this long; beyond a day, whole days."""
    step = next((step for step in STEPS if milliseconds <= step), None)
    return step or -(-int(milliseconds) // STEPS[-1]) * STEPS[-1]


def _to_milliseconds(time: timedelta) -> int:
    return time // timedelta(milliseconds=1)
