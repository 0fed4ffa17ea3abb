"""Measure for how long hostile JSON holds the GIL: `python -m benchmarks.lock_holds [megabytes ...]`.

Prints the longest hold of each step in milliseconds, during which no other thread of a process runs. Bounds:
50 ms for texts of up to 1 MB, 500 ms for those within the limits, on a core as fast as `tests.lock_holds`
defines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from engine import values
from engine.values import InvalidJson
from tests import lock_holds
from tests.hostile_json import TEXTS

MEGABYTE: Final = 1_000_000
SIZES: Final = (1.0, 10.0)
STEPS: Final[Mapping[str, Callable[[Any], object]]] = {
    "encode": values.encode_json,
    "fingerprint": values.fingerprint,
    "compare": lambda value: values.equal_json(value, values.restore_json(values.encode_json(value))),
}


def main(arguments: list[str]) -> None:
    print(f"slowness of this machine: {lock_holds.machine_slowness():.2f}")
    for size in map(float, arguments or SIZES):
        print(f"{size:g} MB{'decode':>36}{''.join(f'{name:>13}' for name in STEPS)}{'release':>13}")
        for name, make in TEXTS.items():
            held = _measure(make(int(size * MEGABYTE)))
            print(f"{name:30}{''.join(f'{seconds * 1000:13.1f}' for seconds in held)}", flush=True)


def _measure(text: bytes) -> list[float]:
    """Return the longest hold of the GIL in seconds by each step, up to the one that refuses the text."""
    found: list[Any] = []
    held = [_measure_longest(lambda: found.append(_decode_each(text)))]
    if found[0] is not None:
        held += [_measure_longest(partial(step, found[0])) for step in STEPS.values()]
        held.append(_measure_longest(found.clear))
    return held


def _decode_each(text: bytes) -> object:
    try:
        return values.decode_json(text)
    except InvalidJson:
        return None


def _measure_longest(step: Callable[[], object]) -> float:
    with lock_holds.measure_holds() as holds:
        step()
    return holds.longest_seconds


if __name__ == "__main__":
    main(sys.argv[1:])
