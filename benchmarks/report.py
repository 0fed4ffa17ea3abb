"""Figures as a table, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.targets import Repetitions, TargetOutcome

NAME_WIDTH = 44


def format_table(repetitions: Repetitions) -> Iterator[str]:
    """Yield the lines of a table: for each figure its median, and all its values if it was repeated."""
    for measured, several in repetitions.items():
        yield ""
        yield f"{measured}, {len(several)} repetitions" if len(several) > 1 else measured
        for name in several[0]:
            yield f"  {name.replace('_', ' '):{NAME_WIDTH}} {_format_spread([figures[name] for figures in several])}"


def save_report(
    path: Path, machine: Mapping[str, str | int], repetitions: Repetitions, outcomes: Iterable[TargetOutcome]
) -> None:
    """Write the machine, all figures and the outcomes of targets into a file, as one JSON object."""
    contents = {
        "machine": machine,
        "figures": repetitions,
        "targets": [asdict(outcome) for outcome in outcomes],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(contents)) + b"\n")


def _format_spread(values: Sequence[float]) -> str:
    middle = f"{_format_value(median(values)):>10}"
    return middle if len(values) == 1 else f"{middle}  ({'  '.join(map(_format_value, values))})"


def _format_value(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
