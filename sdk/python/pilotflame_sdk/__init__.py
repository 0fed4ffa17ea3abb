"""Client of the workflow server Pilotflame, and workers that run your own nodes.

Names are loaded by their first use: a program that only starts runs loads no worker.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pilotflame_sdk.errors import (
    APIError,
    ConfigurationError,
    Conflict,
    DeadlineExceeded,
    LeaseLost,
    LoginRequired,
    NotFound,
    PilotflameError,
    RateLimited,
    RunError,
    RunFailed,
    RunTimeout,
    ScopeRequired,
    TaskCancelled,
    TaskError,
    TransportError,
    ValidationFailed,
)
from pilotflame_sdk.version import VERSION

if TYPE_CHECKING:
    from pilotflame_sdk.async_client import AsyncClient
    from pilotflame_sdk.async_runs import AsyncRun
    from pilotflame_sdk.client import Client
    from pilotflame_sdk.retries import RetryPolicy
    from pilotflame_sdk.runs import Run
    from pilotflame_sdk.server_events import RunEvent
    from pilotflame_sdk.tasks import PortOutput, Task
    from pilotflame_sdk.testing import NodeResult, run_node
    from pilotflame_sdk.worker import Worker
    from pilotflame_sdk.workflow_builder import NodeConfig, TriggerConfig, Workflow
    from pilotflame_sdk.workflow_expressions import WorkflowExpression
    from pilotflame_sdk.workflow_files import WorkflowWarning

__all__ = [
    "APIError",
    "AsyncClient",
    "AsyncRun",
    "Client",
    "ConfigurationError",
    "Conflict",
    "DeadlineExceeded",
    "LeaseLost",
    "LoginRequired",
    "NodeConfig",
    "NodeResult",
    "NotFound",
    "PilotflameError",
    "PortOutput",
    "RateLimited",
    "RetryPolicy",
    "Run",
    "RunError",
    "RunEvent",
    "RunFailed",
    "RunTimeout",
    "ScopeRequired",
    "Task",
    "TaskCancelled",
    "TaskError",
    "TransportError",
    "TriggerConfig",
    "ValidationFailed",
    "Worker",
    "Workflow",
    "WorkflowExpression",
    "WorkflowWarning",
    "__version__",
    "run_node",
]

__version__ = VERSION
_MODULES = {
    "AsyncClient": "async_client",
    "AsyncRun": "async_runs",
    "Client": "client",
    "RetryPolicy": "retries",
    "Run": "runs",
    "RunEvent": "server_events",
    "NodeResult": "testing",
    "PortOutput": "tasks",
    "Task": "tasks",
    "Worker": "worker",
    "NodeConfig": "workflow_builder",
    "TriggerConfig": "workflow_builder",
    "Workflow": "workflow_builder",
    "WorkflowExpression": "workflow_expressions",
    "WorkflowWarning": "workflow_files",
    "run_node": "testing",
}


def __getattr__(name: str) -> object:
    """Load a name by its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"pilotflame_sdk.{_MODULES[name]}"), name)
