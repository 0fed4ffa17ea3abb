"""Backends that run user code."""

from __future__ import annotations

from enum import StrEnum


class CodeBackend(StrEnum):
    """Interpreter of user code."""

    MONTY = "monty"
    """Interpreter of a subset of Python without files, network and processes."""
    SUBPROCESS = "subprocess"
    """CPython in a process that the kernel isolates from files, network and other processes."""
