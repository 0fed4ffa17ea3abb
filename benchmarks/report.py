"""Figures as a table to read, and as JSON to keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.targets import Outcome, Repetitions

NAME_WIDTH = 44


def table(repetitions: Repetitions) -> Iterator[str]:
    """Yield a line for each figure: its median, and its range where there is more than one."""
    for measured, several in repetitions.items():
        yield ""
        yield f"{measured}, {len(several)} repetitions" if len(several) > 1 else measured
        for name in several[0]:
            yield f"  {name.replace('_', ' '):{NAME_WIDTH}} {_spread([figures[name] for figures in several])}"


def save(
    path: Path, machine: Mapping[str, str | int], repetitions: Repetitions, outcomes: Iterable[Outcome]
) -> None:
    """Write everything as one JSON object."""
    contents = {
        "machine": machine,
        "figures": repetitions,
        "targets": [asdict(outcome) for outcome in outcomes],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(contents)) + b"\n")


def _spread(values: Sequence[float]) -> str:
    middle = f"{_shown(median(values)):>10}"
    return middle if len(values) == 1 else f"{middle}  ({'  '.join(map(_shown, values))})"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
