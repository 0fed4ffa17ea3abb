"""Prepare the memory of a process for its forks, after all modules that are loaded before this one.

Their objects are excluded from garbage collections: each of a forked process would go through them, and copy the pages
that they lie on. And their pages become huge ones, since a fork copies an entry for each page.
"""

import ctypes
import gc
from pathlib import Path

HUGE_BYTES = 2 << 20
COLLAPSE = 25
"""Advice `MADV_COLLAPSE` of Linux, since version 6.1; others refuse it, and the pages stay small."""


def join_pages() -> None:
    """Join the pages of the heap to huge ones where the system can."""
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, permissions, *_, inode = line.split()[:5]
        if permissions.startswith("rw") and inode == "0":  # no part of a file
            begin, end = (int(address, 16) for address in area.split("-"))
            for address in range(-(-begin // HUGE_BYTES) * HUGE_BYTES, end - HUGE_BYTES + 1, HUGE_BYTES):
                advise(address, HUGE_BYTES, COLLAPSE)


# Without a collection before it: it would take a sixth of a second, and find next to nothing.
gc.freeze()
gc.enable()
join_pages()
