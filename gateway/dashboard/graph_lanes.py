"""Lanes beside the rows of a run: lines of its graph from each node to the nodes that follow it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from msgspec import Struct

LANES: Final = (18, 36, 54)
"""Horizontal positions of lanes; further lanes share the last one."""
WIDTH: Final = 66
MIDDLE: Final = 18
HEIGHT: Final = 36


class LanePath(Struct, frozen=True):
    """Line of the graph beside a row; `is_taken` is false for a branch that the run did not take."""

    path: str
    is_taken: bool


class LaneEdge(Struct, frozen=True):
    """Connection between two rows, by their ids."""

    source: str
    target: str
    is_inner: bool = False
    """Whether it leads into the body of a loop, which gets a lane of its own."""


class RowLanes(Struct, frozen=True):
    """Lane of a row, and the lines that pass it."""

    x: int
    paths: Sequence[LanePath]


class _Line(Struct, frozen=True):
    """Line on its way to a row."""

    row: int
    is_taken: bool


def draw_lanes(
    rows: Sequence[str], edges: Sequence[LaneEdge], not_taken: Collection[str]
) -> Sequence[RowLanes]:
    """Return the lane (vertical track) of each row from top to bottom, with the lines between rows as SVG paths.

    `rows` are ids; edges to absent or earlier rows are left out. Lines to rows in `not_taken`, and from them,
    are dashed. There are three lanes: more lines share the last one.
    """
    place = {row: number for number, row in enumerate(rows)}
    targets = _find_targets(place, edges)
    lines: list[_Line | None] = []
    """For each lane, the line that it has between two rows."""
    drawn = []
    for number, row in enumerate(rows):
        arriving = [lane for lane, line in enumerate(lines) if line is not None and line.row == number]
        own = arriving[0] if arriving else _free_lane(lines)
        x = _lane_x(own)
        paths: dict[str, bool] = {}
        for lane, line in enumerate(lines):
            if line is not None and line.row != number:
                _add_path(paths, f"M{_lane_x(lane)} 0V{HEIGHT}", is_taken=line.is_taken)
        for lane in arriving:
            line = lines[lane]
            is_taken = line is not None and line.is_taken
            _add_path(paths, _draw_curve(_lane_x(lane), 0, x, MIDDLE), is_taken=is_taken)
            lines[lane] = None
        for later in targets.get(number, ()):
            is_taken = row not in not_taken and rows[later] not in not_taken
            lane = _lane_to(lines, later, own)
            lines += [None] * (lane + 1 - len(lines))
            lines[lane] = _Line(later, is_taken)
            _add_path(paths, _draw_curve(x, MIDDLE, _lane_x(lane), HEIGHT), is_taken=is_taken)
        drawn.append(RowLanes(x, [LanePath(path, is_taken) for path, is_taken in paths.items()]))
    return drawn


def _find_targets(place: Mapping[str, int], edges: Sequence[LaneEdge]) -> Mapping[int, Sequence[int]]:
    """Return the indexes of the later rows that each row leads to, by its index.

    Edges in bodies of loops come last, so that they leave the lane. Edges to unknown or earlier rows are left
    out.
    """
    found: dict[int, dict[int, bool]] = {}
    for edge in edges:
        source, target = place.get(edge.source), place.get(edge.target)
        if source is not None and target is not None and source < target:
            found.setdefault(source, {}).setdefault(target, edge.is_inner)
    return {
        source: sorted(later, key=lambda target: (later[target], target)) for source, later in found.items()
    }


def _add_path(paths: dict[str, bool], path: str, *, is_taken: bool) -> None:
    """Add a line to `paths`, by its path: True if it, or a line added before at the same place, was taken."""
    paths[path] = is_taken or paths.get(path, False)


def _lane_to(lines: Sequence[_Line | None], row: int, own: int) -> int:
    """Return the lane that leads to a row already, else the own lane if it is free, else the first free one."""
    known = next((lane for lane, line in enumerate(lines) if line is not None and line.row == row), None)
    if known is not None:
        return known
    return own if own >= len(lines) or lines[own] is None else _free_lane(lines)


def _free_lane(lines: Sequence[_Line | None]) -> int:
    """Return the index of the first lane without a line; the number of lanes if all have one."""
    return next((lane for lane, line in enumerate(lines) if line is None), len(lines))


def _lane_x(lane: int) -> int:
    """Return the horizontal position of a lane in pixels; lanes after the third share its position."""
    return LANES[min(lane, len(LANES) - 1)]


def _draw_curve(x1: int, y1: int, x2: int, y2: int) -> str:
    """Return the SVG path of a curve from one point to another; a straight line if they are above each other."""
    if x1 == x2:
        return f"M{x1} {y1}V{y2}"
    middle = (y1 + y2) // 2
    return f"M{x1} {y1}C{x1} {middle} {x2} {middle} {x2} {y2}"
