"""How a process that serves lives with Python's collector of garbage."""

from __future__ import annotations

import gc
from typing import Final

YOUNG_OBJECTS: Final = 10_000
"""So many new ones are looked through at once. Python's own 700 are those of a few requests and runs under way, so that
nearly all are still in use; what is not in use is mostly gone by then, since its references are counted.
"""


def begin() -> None:
    """Collect less often, from the start on: what modules are made of is no garbage."""
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])


def settle() -> None:
    """Leave out of collections what was loaded so far, which makes them short, and collect less often."""
    gc.collect()
    gc.freeze()
    begin()
