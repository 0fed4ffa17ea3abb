"""Coverage-guided fuzzing of the parsers of bytes from strangers.

    python -m benchmarks.fuzz [--seconds 3600] [--targets json mime ...] [--corpus FOLDER]

The time is shared by the targets, two of which run at once. A finding is an exception, a broken property, an input that
takes over five seconds, or memory beyond 2 GB: its input is kept below `--findings`, its traceback is printed, and the
exit code is 1. With `--corpus` the inputs that reached new code are kept, and a later run starts from them.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.fuzz_targets import TARGETS
from tests.tools.environments import ToolEnvironment

ENVIRONMENT: Final = ToolEnvironment("fuzz")
AT_ONCE: Final = 2
INPUT_SECONDS: Final = 5
MAX_BYTES: Final = 16_384
MEMORY_MEGABYTES: Final = 2_048
_PROGRESS: Final = re.compile(r"^#(\d+)\s.*?cov: (\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class FuzzRequest:
    """Parsed command line."""

    seconds: int
    targets: Sequence[str]
    corpus: Path | None
    findings: Path


@dataclass(frozen=True, slots=True)
class FuzzResult:
    """Result of one target: inputs tried, code points reached, and the end of the output if something was found."""

    target: str
    inputs: int
    coverage: int
    finding: str | None


def main() -> int:
    """Fuzz every target, print a line for each, and return 1 if one has a finding."""
    request = _parse_request()
    request.findings.mkdir(parents=True, exist_ok=True)
    seconds = max(1, request.seconds * AT_ONCE // len(request.targets))
    with ThreadPoolExecutor(AT_ONCE) as threads:
        results = list(threads.map(partial(fuzz_target, request, seconds), request.targets))
    return int(any(result.finding for result in results))


def fuzz_target(request: FuzzRequest, seconds: int, target: str) -> FuzzResult:
    """Fuzz one target for some seconds in a process of its own, and print and return the result."""
    (packages,) = ENVIRONMENT.folder.glob("lib/python*/site-packages")
    with tempfile.TemporaryDirectory(prefix="pilotflame-fuzz-") as scratch:
        corpus = Path(scratch) if request.corpus is None else request.corpus / target
        corpus.mkdir(parents=True, exist_ok=True)
        options = [
            f"-max_total_time={seconds}",
            f"-timeout={INPUT_SECONDS}",
            f"-max_len={MAX_BYTES}",
            f"-rss_limit_mb={MEMORY_MEGABYTES}",
            f"-artifact_prefix={request.findings / target}-",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.fuzz_process", target, str(corpus), *options],
            env={**os.environ, "PYTHONPATH": str(packages)},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    result = read_result(target, done.returncode, done.stdout + done.stderr)
    print(f"{target}: {result.inputs:,} inputs, {result.coverage:,} code points", flush=True)
    if result.finding:
        print(result.finding, flush=True)
    return result


def read_result(target: str, exit_code: int, output: str) -> FuzzResult:
    """Return the result from the output of a fuzzing process; an exit code other than 0 is a finding."""
    progress = _PROGRESS.findall(output)
    inputs, coverage = map(int, progress[-1]) if progress else (0, 0)
    return FuzzResult(target, inputs, coverage, output[-4_000:] if exit_code else None)


def _parse_request() -> FuzzRequest:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "pilotflame-findings")
    return FuzzRequest(**vars(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
