"""Limit of open file descriptors of this process."""

from __future__ import annotations

import resource
from typing import Final

MAX_DESCRIPTORS: Final = 65_536
"""Enough for all resources of one process; some child programs need time and memory in proportion to the
limit.
"""


def raise_descriptor_limit() -> int:
    """Raise this process's soft limit of open files to the hard one, at most 65,536; return the limit that holds then.

    A limit that is higher already is not lowered; for an unlimited one, 65,536 is returned.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
