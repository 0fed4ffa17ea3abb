"""Selection of the runner for code nodes by the settings of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from nodes.sandbox.children import confinement
from nodes.sandbox.code.code_runner import CodeRunner, RefusedCode

if TYPE_CHECKING:
    from execution.settings import ExecutionSettings

log = structlog.get_logger()

REFUSAL_REASONS = {
    "off": "This server runs no code nodes",
    "pods-only": "This server runs code nodes in pods only: deploy the workflow",
}


def open_worker_code(settings: ExecutionSettings) -> CodeRunner | RefusedCode:
    """Return the runner for code nodes on a shared worker: one that refuses them unless the setting is `on`.

    It starts processes only when needed.
    """
    if settings.code_nodes == "on":
        return _open_code(settings)
    return RefusedCode(REFUSAL_REASONS[settings.code_nodes])


def open_pod_code(settings: ExecutionSettings) -> CodeRunner | RefusedCode:
    """Return the runner for code nodes in a pod of a single workflow: one that refuses them only if the
    setting is `off`.

    It starts processes only when needed.
    """
    if settings.code_nodes == "off":
        return RefusedCode(REFUSAL_REASONS["off"])
    return _open_code(settings)


def _open_code(settings: ExecutionSettings) -> CodeRunner:
    missing = confinement.missing_protections()
    if missing:
        log.warning("kernel lacks protections for code nodes", missing=missing, backend=settings.code_backend)
    return CodeRunner(settings.code_backend, limit=settings.cpu_processes)
