"""Samples a process with py-spy while it works: a flame graph, and the functions in which it spends its time."""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

SAMPLES_PER_SECOND = 250
TOP = 30
START_SECONDS = 1.5
"""py-spy reads the symbols of every library first."""
LINE_NUMBER = re.compile(r":\d+\)$")


@dataclass(frozen=True, slots=True)
class ProcessProfiler:
    """Sampling profiler of one process, and the folder of its results."""

    process: str
    folder: Path

    async def record(self, process_id: int, seconds: float) -> list[Path]:
        """Sample a process for `seconds`, half for a flame graph and half for a list of functions;
        return both files.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        graph, stacks, functions = (
            self.folder / f"{self.process}.{kind}" for kind in ("svg", "stacks", "txt")
        )
        for file, kind in ((graph, "flamegraph"), (stacks, "raw")):
            await _record(process_id, file, kind, max(1, round(seconds / 2 - START_SECONDS)))
        functions.write_text(summarize_stacks(stacks.read_text().splitlines()))
        return [graph, functions]


async def _record(process_id: int, file: Path, kind: str, seconds: int) -> None:
    """Sample a process by py-spy into a file; raises `OSError` if that fails."""
    program = str(Path(sys.executable).with_name("py-spy"))
    process = await asyncio.create_subprocess_exec(
        *(program, "record", "--pid", str(process_id), "--duration", str(seconds)),
        "--subprocesses",  # A worker is the child of a process that only waits for it.
        "--nonblocking",  # Pausing the process would wake its waiting threads, which would then count as busy.
        *("--rate", str(SAMPLES_PER_SECOND), "--format", kind, "--output", str(file)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    if process.returncode != 0:
        raise OSError(f"py-spy could not sample process {process_id}: {said.decode()}")


def summarize_stacks(stacks: Iterable[str]) -> str:
    """Return a text with the functions that were sampled most often, from lines of `outer;inner;innermost count`."""
    alone: Counter[str] = Counter()
    with_callees: Counter[str] = Counter()
    callees: defaultdict[str, set[str]] = defaultdict(set)
    for line in stacks:
        frames, _, count = line.rpartition(" ")
        functions = [LINE_NUMBER.sub(")", frame) for frame in frames.split(";")]
        alone[functions[-1]] += int(count)
        for function in set(functions):
            with_callees[function] += int(count)
        for caller, callee in pairwise(functions):
            callees[caller].add(callee)
    # Functions that only call one other function, such as the command line, explain nothing.
    telling = {name: count for name, count in with_callees.items() if name in alone or len(callees[name]) > 1}
    samples = alone.total()
    return "\n".join(
        [
            f"{samples} samples",
            *_format_section("In the function itself", alone, samples),
            *_format_section("In it and what it calls", Counter(telling), samples),
            "",
        ]
    )


def _format_section(title: str, counts: Counter[str], samples: int) -> list[str]:
    lines = [f"{count / samples:7.1%}  {function}" for function, count in counts.most_common(TOP)]
    return ["", title, *lines]
