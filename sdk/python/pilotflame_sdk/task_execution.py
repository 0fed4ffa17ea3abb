"""Execution of tasks: in daemon threads, on the event loop, or in processes that can be killed."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import multiprocessing
import queue
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from pilotflame_sdk import schemas, trace_context
from pilotflame_sdk.errors import (
    APIError,
    DeadlineExceeded,
    LeaseLost,
    PilotflameError,
    TaskCancelled,
    TaskError,
)
from pilotflame_sdk.tasks import CURRENT_TASK, PortOutput, Task, plain_text

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from pilotflame_sdk.held_tasks import HeldTask
    from pilotflame_sdk.node_definitions import NodeDefinition
    from pilotflame_sdk.task_channel import TaskChannel

log = logging.getLogger(__name__)

RELEASE: Final[Mapping[str, Any]] = {"kind": "release"}
OUTPUT: Final = "output"
MAX_MESSAGE: Final = 2_000
MAX_CODE: Final = 64
TOO_LARGE: Final = 413
WATCH_SECONDS: Final = 0.2


class ThreadPool:
    """Threads that end with the process: a function that never returns can't keep it alive."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._count = 0

    def submit(self, call: Callable[[], None]) -> None:
        """Run a call in an idle thread, or in a new one while there are fewer than the size; else queue the call."""
        self._calls.put(call)
        if not self._idle.acquire(blocking=False) and self._count < self._size:
            self._count += 1
            threading.Thread(target=self._work, name="pilotflame-node", daemon=True).start()

    def _work(self) -> None:
        """Run the queued calls, one after the other, forever; the body of a thread."""
        while True:
            self._calls.get()()
            self._idle.release()


def complete(returned: object) -> Mapping[str, Any]:
    """Return the final report for the value that a function returned; None becomes an empty object."""
    port, value = (returned.port, returned.value) if isinstance(returned, PortOutput) else (OUTPUT, returned)
    return {"kind": "complete", "port": port, "output": {} if value is None else schemas.to_json(value)}


def fail(error: BaseException, task: Task) -> Mapping[str, Any]:
    """Return the final report for an error of a function.

    A `TaskError` says itself whether to retry; any other error is retried, and its traceback is written to
    the log.
    """
    if isinstance(error, TaskError):
        retry: Any = error.retry
        if not isinstance(retry, bool):
            retry = {"afterSeconds": retry}
        return {"kind": "fail", "error": _error(error.code, error.message), "retry": retry}
    task.log("".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip(), "error")
    return {"kind": "fail", "error": _error("exception", f"{type(error).__name__}: {error}"), "retry": True}


def stop(task: Task) -> Mapping[str, Any]:
    """Return the final report for a function that was asked to stop: a failure after the timeout, else a release."""
    if isinstance(task.end_reason, DeadlineExceeded):
        return {"kind": "fail", "error": _error("timeout", task.end_reason), "retry": True}
    return RELEASE


def _error(code: object, message: object) -> Mapping[str, str]:
    """Return code and message of an error for a report, as plain texts of limited length."""
    return {"code": plain_text(code, MAX_CODE), "message": plain_text(message, MAX_MESSAGE)}


class TaskExecutor:
    """Runs the functions of claimed tasks, and hands their final reports over."""

    def __init__(
        self,
        slots: int,
        loop: asyncio.AbstractEventLoop,
        channel: TaskChannel,
        finish: Callable[[HeldTask, Mapping[str, Any]], None],
    ) -> None:
        self._pool = ThreadPool(slots)
        self._loop = loop
        self._channel = channel
        self._finish = finish

    def start(self, held: HeldTask, definition: NodeDefinition | None, config: object) -> None:
        """Begin the function of a task in a thread, on the event loop or in a process; returns at once.

        A task without a definition is given back, for a worker that has its code, and so is one that was lost or
        cancelled meanwhile.
        """
        if definition is None or held.task.is_cancelled:
            self._finish(held, RELEASE)
        elif definition.is_async:
            self._loop.call_soon_threadsafe(self._start_coroutine, held, definition, config)
        else:
            run = self._run_in_process if definition.is_process else self._run_in_thread
            context = contextvars.Context()
            self._pool.submit(lambda: context.run(run, held, definition, config))

    def _run_in_thread(self, held: HeldTask, definition: NodeDefinition, config: object) -> None:
        """Run the function of a task in this thread to its end, and hand over its final report.

        A cancelled function gives the task back; any other error makes the task fail.
        """
        task = held.task
        held.thread_id = threading.get_ident()
        try:
            task.input = self._channel.fetch_input(held)
            positional, named = _arguments(definition, config, task)
            _enter(task)
            report = self._build_completion(held, definition.function(*positional, **named))
        except TaskCancelled:
            report = stop(task)
        except BaseException as error:  # noqa: BLE001 - also SystemExit: a function can't end its worker
            report = fail(error, task)
        self._finish(held, report)

    def _build_completion(self, held: HeldTask, returned: object) -> Mapping[str, Any]:
        """Return the final report for the value that a function returned, after sending a large output.

        Raises `TaskError` for a value that is no JSON, and for an output that could not be sent.
        """
        report = complete(returned)
        try:
            return {**report, "output": self._channel.send_output(held, report["output"])}
        except (TypeError, ValueError) as error:
            raise TaskError("invalid-output", f"The output is no JSON: {error}", retry=False) from error
        except APIError as error:
            if error.code == "lease-lost":
                raise LeaseLost(str(error)) from error
            is_final = error.status == TOO_LARGE
            code = "result-too-large" if is_final else "output-not-sent"
            raise TaskError(code, str(error), retry=not is_final) from error
        except PilotflameError as error:
            raise TaskError("output-not-sent", str(error)) from error

    # ── coroutines ────────────────────────────────────────────────────────────────────────────────────────

    def _start_coroutine(self, held: HeldTask, definition: NodeDefinition, config: object) -> None:
        """Start the async function of a task on the event loop, so that the end of the task cancels it."""
        running = self._loop.create_task(self._run_coroutine(held, definition, config))
        held.on_end.append(lambda: _cancel_soon(self._loop, running))
        if held.task.is_cancelled:
            running.cancel()

    async def _run_coroutine(self, held: HeldTask, definition: NodeDefinition, config: object) -> None:
        """Run an async function of a task to its end, and hand over its final report."""
        task = held.task
        try:
            if isinstance(task.input, dict) and task.input.keys() == {"$blob"}:
                task.input = await asyncio.to_thread(self._channel.fetch_input, held)
            positional, named = _arguments(definition, config, task)
            _enter(task)
            returned = await definition.function(*positional, **named)
            report = await asyncio.to_thread(self._build_completion, held, returned)
        except (TaskCancelled, asyncio.CancelledError):
            report = stop(task)
        except BaseException as error:  # noqa: BLE001 - as above
            report = fail(error, task)
        self._finish(held, report)

    # ── processes ─────────────────────────────────────────────────────────────────────────────────────────

    def _run_in_process(self, held: HeldTask, definition: NodeDefinition, config: object) -> None:
        """Run the function of a task in a process of its own, and hand over its final report."""
        task = held.task
        process = None
        try:
            task.input = self._channel.fetch_input(held)
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe(duplex=False)
            fields = _fields_of(task)
            process = context.Process(
                target=_work_in_process, args=(definition.function, definition.type, fields, config, theirs)
            )
            process.start()
            theirs.close()
            report = self._completed_process(held, ours, process)
        except TaskCancelled:
            report = stop(task)
        except BaseException as error:  # noqa: BLE001 - as above
            report = fail(error, task)
        if process is not None and process.pid is not None:
            process.kill()
            process.join()
        self._finish(held, report)

    def _completed_process(self, held: HeldTask, pipe: Connection, process: Any) -> Mapping[str, Any]:  # noqa: ANN401 - of any context
        """Pass on progress, checkpoints and log lines of a process until its function returns; return the final report.

        Raises `TaskCancelled` once the function should stop, and `TaskError` if the process dies.
        """
        task = held.task
        while True:
            if task.is_cancelled:
                task.raise_if_cancelled()
            if not pipe.poll(WATCH_SECONDS):
                continue
            try:
                name, value = pipe.recv()
            except EOFError:
                process.join()
                raise TaskError("process-died", f"The process ended with code {process.exitcode}") from None
            if name == "progress":
                task.progress(**value)
            elif name == "checkpoint":
                task.checkpoint = value
            elif name == "log":
                task.log(*value)
            elif name == "report":
                output = value.get("output")
                return (
                    value
                    if output is None
                    else self._build_completion(held, PortOutput(value["port"], output))
                )


def _cancel_soon(loop: asyncio.AbstractEventLoop, running: asyncio.Task[None]) -> None:
    """Cancel a coroutine on its event loop; safe to call from any thread."""
    loop.call_soon_threadsafe(running.cancel)


class _ProcessTask(Task):
    """Task in a process of its own: what it reports goes through a pipe."""

    def __init__(self, fields: Mapping[str, Any], pipe: Connection) -> None:
        super().__init__(fields)
        self._pipe = pipe

    def log(self, message: str, level: str = "info") -> None:
        """Send a log line to the worker, as `Task.log` does."""
        self._pipe.send(("log", (str(message), level)))

    def _note(self, name: str, value: Any) -> None:  # noqa: ANN401 - any JSON
        self._pipe.send((name, value))


def _work_in_process(
    function: Callable[..., Any], type_name: str, fields: Mapping[str, Any], config: object, pipe: Connection
) -> None:
    """Run a function in this process of its own, and send its reports through the pipe.

    Its config is found again by the function's annotations.
    """
    from pilotflame_sdk.node_definitions import define_node
    from pilotflame_sdk.tasks import TaskLogHandler

    task = _ProcessTask({**fields, "config": config}, pipe)
    try:
        definition = define_node(
            function, type_name, "0.0.0", is_process=True, fields={"effect": "write"}, task_rules={}
        )
        logging.getLogger().addHandler(TaskLogHandler(logging.INFO))
        positional, named = _arguments(definition, config, task)
        _enter(task)
        report = complete(function(*positional, **named))
    except BaseException as error:  # noqa: BLE001 - as above
        report = fail(error, task)
    pipe.send(("report", report))


def _enter(task: Task) -> None:
    """Make a task the current one, for its log lines and traces, in the present `contextvars` context."""
    CURRENT_TASK.set(task)
    trace_context.attach(task)


def _arguments(definition: NodeDefinition, config: object, task: Task) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of a function; raises `TaskError` without a retry for a config that doesn't fit."""
    try:
        return definition.arguments(config, task)
    except Exception as error:
        raise TaskError("invalid-config", f"{type(error).__name__}: {error}", retry=False) from error


def _fields_of(task: Task) -> Mapping[str, Any]:
    """Return the fields of a task that another process needs to build the same task."""
    return {
        "id": task.id,
        "type": task.type,
        "version": task.version,
        "attempt": task.attempt,
        "executionId": task.execution_id,
        "nodeId": task.node_id,
        "idempotencyKey": task.idempotency_key,
        "deadline": task.deadline,
        "input": task.input,
        "checkpoint": task.checkpoint,
        "traceparent": task.traceparent,
    }
