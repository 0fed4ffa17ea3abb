"""Use every part of the SDK against a server: both clients, a workflow built in code, and a worker of each kind.

Arguments: the URL of a server and an API key. A test runs it with the oldest and the newest Python at hand.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, Any

from pilotflame_sdk import (
    AsyncClient,
    Client,
    NodeConfig,
    NotFound,
    PortOutput,
    RunFailed,
    Task,
    TaskError,
    TriggerConfig,
    Worker,
    Workflow,
    node_code,
    run_node,
)

NAME = "py" + "-".join(map(str, sys.version_info[:2]))
worker = Worker(NAME, slots=4, grace=10)


@dataclass
class Sum:
    """Config with fields of several kinds."""

    numbers: list[int]
    day: date
    unit: Annotated[str, {"maxLength": 5}, "Unit of the sum."] = "kg"
    note: str | None = None
    parts: dict[str, int] = field(default_factory=dict)


@worker.node(f"{NAME}/thread", "1.0.0", effect="read", retry=2)
def add_in_thread(config: Sum, task: Task) -> dict[str, Any]:
    """Add numbers in a thread; the first attempt fails."""
    if task.attempt == 1:
        task.checkpoint = {"failed": True}
        raise ValueError("not yet")
    total = sum(task.track(config.numbers))
    task.log(f"{config.day.isoformat()}: {total} {config.unit}")
    return {"total": total, "checkpoint": task.checkpoint, "thread": threading.current_thread().name}


@worker.node(f"{NAME}/loop", "1.0.0", effect="pure", ports=["output", "odd"])
async def choose_on_loop(config: dict[str, Any], task: Task) -> PortOutput[dict[str, Any]] | dict[str, Any]:
    """Choose a port on the event loop."""
    await asyncio.sleep(0)
    return task.port("odd", config) if config["total"] % 2 else config


@worker.node(f"{NAME}/process", "1.0.0", effect="pure", process=True)
def count_in_process(config: dict[str, Any]) -> dict[str, Any]:
    """Report the process that it runs in."""
    if not config:
        raise TaskError("empty", "Nothing to count.", retry=False)
    return {"pid": os.getpid(), "count": len(config)}


def build_workflow(n: Mapping[str, Callable[..., Any]]) -> Workflow:
    """Return a workflow with all three nodes, made with the pulled module."""
    with Workflow(f"Interpreter {NAME}", status="active") as w:
        start = w.trigger(n["manual"]())
        config = {"numbers": start.data.body.numbers, "day": "2026-02-28"}
        total = w.add(n[f"{NAME.replace('-', '_')}_thread"](**config), after=start, id="thread")
        chosen = w.add(NodeConfig(f"{NAME}/loop", {"total": total.data.total}), after=total, id="loop")
        w.add(NodeConfig(f"{NAME}/process", {"a": 1}), after=chosen.port("odd"), id="process")
    return w


def use_client(url: str, key: str) -> str:
    """Apply the workflow, run it, and read its events; return its name."""
    with Client(url, key) as client:
        pulled: dict[str, Any] = {}
        exec(node_code.write_module(node_code.read_catalog(client)), pulled)  # noqa: S102 - the pulled module
        built = build_workflow(pulled)
        assert [one["action"] for one in client.workflows.apply(built)["changes"]] == ["create"]
        assert [one["action"] for one in client.workflows.apply(built)["changes"]] == ["unchanged"]
        run = client.run(built.name, {"numbers": [1, 2, 4]}, wait=60)
        found = run.outputs
        assert found["process"]["pid"] != os.getpid()
        events = list(client.executions.stream(run.id))
        assert events[-1].data["status"] == "completed"
        assert found["thread"]["total"] == 7
        assert found["thread"]["checkpoint"] == {"failed": True}
        failing = Workflow(f"Failing {NAME}")
        failing.add(
            NodeConfig(f"{NAME}/process"), after=failing.trigger(TriggerConfig("manual")), id="process"
        )
        client.workflows.put(failing)
        with expect(RunFailed) as errors:
            client.start(failing.name).result(timeout=60)
        assert [one.node_id for one in errors if isinstance(one, RunFailed)] == ["process"]
        with expect(NotFound):
            client.workflows.get("wf_nowhere")
        return built.name


@contextmanager
def expect(kind: type[Exception]) -> Iterator[list[Exception]]:
    """Require that the block raises an error of a class."""
    found: list[Exception] = []
    try:
        yield found
    except kind as error:
        found.append(error)
    assert found, f"{kind.__name__} was not raised"


async def use_async_client(url: str, key: str, name: str) -> None:
    """Run the workflow three times at once with the asynchronous client."""
    async with AsyncClient(url, key) as client:
        runs = await asyncio.gather(*(client.run(name, {"numbers": [n]}, wait=60) for n in (2, 4, 6)))
        assert [run.outputs["loop"]["total"] for run in runs] == [2, 4, 6]


def main(url: str, key: str) -> None:
    """Run the worker in a thread, and use both clients against the server meanwhile."""
    assert run_node(count_in_process, {"a": 1}).output["count"] == 1
    worker.register()
    serving = threading.Thread(target=_serve)
    serving.start()
    try:
        name = use_client(url, key)
        asyncio.run(use_async_client(url, key, name))
    finally:
        worker.stop()
        serving.join(60)
    assert not serving.is_alive()
    sys.stdout.write(f"Python {sys.version.split()[0]} has used the SDK\n")


def _serve() -> None:
    asyncio.run(worker.serve())


if __name__ == "__main__":
    main(*sys.argv[1:])
