"""Process of the fuzzer for one target: `python -m benchmarks.fuzz_process TARGET FOLDER [libFuzzer options]`.

Atheris instruments the project's modules while they are imported, so that inputs which reach new code are kept as
starting points of others. An exception, or an input beyond the time limit, ends the process with the input in a file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import atheris  # type: ignore[import-untyped]  # without types, and only in the environment of the fuzzer

PACKAGES: Final = ["engine", "gateway", "json_text", "mail", "models", "nodes", "senders"]

with atheris.instrument_imports(include=PACKAGES):
    from benchmarks import fuzz_targets


def main() -> None:
    """Write the seeds into the folder, and fuzz the target until the limits of its options; this ends the process."""
    name, folder, *options = sys.argv[1:]
    target = fuzz_targets.TARGETS[name]
    for number, seed in enumerate(target.seeds()):
        (Path(folder) / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], folder, *options], target.parse)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
