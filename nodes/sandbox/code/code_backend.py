"""The two ways of running user code."""

from __future__ import annotations

from enum import StrEnum


class CodeBackend(StrEnum):
    """What understands the code."""

    MONTY = "monty"
    """An interpreter of a part of Python that knows no files, no network and no processes."""
    SUBPROCESS = "subprocess"
    """All of Python, in a process that the kernel keeps from all of these."""
