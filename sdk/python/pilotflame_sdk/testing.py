"""Tests of nodes without a server."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pilotflame_sdk.tasks import CURRENT_TASK, PortOutput, Task


@dataclass(frozen=True)
class NodeResult:
    """Result of a node's function, with everything that it has reported."""

    output: Any
    port: str
    progress: Mapping[str, Any] | None
    checkpoint: Any
    lines: list[dict[str, str]]
    """Lines of the log, each with `level`, `at` and `message`."""


def run_node(
    function: Callable[..., Any],
    config: Any = None,  # noqa: ANN401 - as the function takes it
    *,
    input: Any = None,  # noqa: A002, ANN401 - the name of the attribute
    attempt: int = 1,
    checkpoint: Any = None,  # noqa: ANN401 - any JSON
    cancelled: bool = False,
    idempotency_key: str = "exec_test:node:1",
) -> NodeResult:
    """Call a node's function as a worker would, without a server, and return its result; its errors are raised.

    `config` is the value as the function takes it. With `cancelled`, the task is cancelled from the
    beginning.
    """
    from pilotflame_sdk.node_definitions import define_node

    fields = {
        "id": "task_test",
        "type": "test/node",
        "version": "0.0.0",
        "attempt": attempt,
        "executionId": "exec_test",
        "nodeId": "node",
        "idempotencyKey": idempotency_key,
        "input": input,
        "checkpoint": checkpoint,
    }
    task = Task(fields)
    if cancelled:
        task.cancel()
    definition = define_node(
        function, "test/node", "0.0.0", is_process=False, fields={"effect": "write"}, task_rules={}
    )
    given = [config] if definition.takes_config else []
    named = {} if definition.task_name is None else {definition.task_name: task}
    token = CURRENT_TASK.set(task)
    try:
        returned = function(*given, **named)
        if inspect.iscoroutine(returned):
            returned = asyncio.run(returned)
    finally:
        CURRENT_TASK.reset(token)
    port, value = ("output", returned)
    if isinstance(returned, PortOutput):
        port, value = returned.port, returned.value
    return NodeResult(value, port, task.take_news().get("progress"), task.checkpoint, task.take_lines())
