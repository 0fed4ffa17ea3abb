"""Whether and how a process runs users' code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nodes.code.runner import CodeRunner, RefusedCode

if TYPE_CHECKING:
    from execution.settings import ExecutionSettings

REASONS = {
    "off": "This server runs no code nodes",
    "pods-only": "This server runs code nodes in pods only: deploy the workflow",
}


def open_code(settings: ExecutionSettings) -> CodeRunner | RefusedCode:
    """Return what runs code nodes on a shared worker; nothing is started before it is needed."""
    if settings.code_nodes == "on":
        return CodeRunner(settings.code_backend, limit=settings.cpu_processes)
    return RefusedCode(REASONS[settings.code_nodes])


def open_code_of_pod(settings: ExecutionSettings) -> CodeRunner | RefusedCode:
    """Return what runs code nodes in a pod, which is one workflow's own."""
    if settings.code_nodes == "off":
        return RefusedCode(REASONS["off"])
    return CodeRunner(settings.code_backend, limit=settings.cpu_processes)
