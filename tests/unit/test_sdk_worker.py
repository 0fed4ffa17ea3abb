"""Worker of the Python SDK: functions in threads, on the loop and in processes, cancellation, lost answers, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
import pydantic
import pytest
from opentelemetry import trace
from pilotflame_sdk import (
    LeaseLost,
    PortOutput,
    Task,
    TaskCancelled,
    TaskError,
    Worker,
    held_tasks,
    run_node,
    schemas,
    task_channel,
)

from tests.unit import worker_nodes
from tests.unit.task_server_double import TaskServerDouble, run_task_server


@pytest.fixture
def server() -> Iterator[TaskServerDouble]:
    with run_task_server() as double:
        yield double


def new_worker(server: TaskServerDouble, **options: Any) -> Worker:  # noqa: ANN401 - as `Worker`
    return Worker("test", url=server.url, api_key="sk-1", **{"slots": 4, "grace": 10.0, **options})


@asynccontextmanager
async def serving(worker: Worker) -> AsyncIterator[None]:
    """Run a worker on the loop of the test, and drain it at the end."""
    running = asyncio.create_task(worker.serve())
    await asyncio.sleep(0)
    try:
        yield
    finally:
        worker.stop()
        await running


@dataclass
class Resize:
    """Config with all kinds of fields."""

    image: str
    width: Annotated[int, {"minimum": 1}, "Width in pixels."] = 1200
    mode: Literal["fit", "fill"] = "fit"
    tags: list[str] = field(default_factory=list)
    note: str | None = None


@dataclass
class Resized:
    """Output."""

    url: str


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_functions_run_in_threads_on_the_loop_and_in_processes(server: TaskServerDouble) -> None:
    worker = new_worker(server)

    @worker.node("acme/resize", "1.2.0", ports=["output", "too-small"])
    def resize(config: Resize, task: Task) -> Resized | PortOutput[Any]:
        if config.width < 10:
            return task.port("too-small", {"width": config.width})
        return Resized(
            f"{config.image}-{config.width}-{threading.current_thread().name}-{task.idempotency_key}"
        )

    @worker.node("acme/loop", "1.0.0")
    async def on_loop(task: Task) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"thread": threading.current_thread().name, "input": task.input}

    worker.node("acme/count", "1.0.0", process=True)(worker_nodes.count)
    server.add("t1", "acme/resize", config={"image": "a.png"}, version="1.1.0", idempotencyKey="k1")
    server.add("t2", "acme/resize", config={"image": "a.png", "width": 3})
    server.add("t3", "acme/loop", input={"n": 1})
    server.add("t4", "acme/count", config={"number": 2}, input=[1])
    async with serving(worker):
        first, second, third, fourth = [
            await asyncio.to_thread(server.end, name) for name in ("t1", "t2", "t3", "t4")
        ]
    assert first["output"] == {"url": "a.png-1200-pilotflame-node-k1"}
    assert (first["kind"], first["port"], first["lease"]) == ("complete", "output", "lease-t1")
    assert (second["port"], second["output"]) == ("too-small", {"width": 3})
    assert third["output"] == {"thread": "MainThread", "input": {"n": 1}}
    assert fourth["output"]["input"] == [1]
    assert fourth["output"]["config"] == {"number": 2}
    assert fourth["output"]["process"] != os.getpid()
    lines = [line["message"] for item in server.items if item["kind"] == "log" for line in item["lines"]]
    assert lines == ["at 0", "at 1"]


async def test_errors_say_whether_the_server_repeats_the_task(server: TaskServerDouble) -> None:
    worker = new_worker(server)

    @worker.node("acme/work", "1.0.0")
    def work(config: dict[str, Any]) -> Any:  # noqa: ANN401 - any output
        match config["how"]:
            case "final":
                raise TaskError("image-missing", "No such image.", retry=False)
            case "later":
                raise TaskError("busy", "Later.", retry=30)
            case "exit":
                raise SystemExit(3)
            case "wrong":
                return {"x": object()}
        raise ValueError("a surprise")

    worker.node("acme/typed", "1.0.0")(worker_nodes.count)
    worker.node("acme/die", "1.0.0", process=True)(worker_nodes.die)
    for how in ("final", "later", "exit", "wrong", "else"):
        server.add(how, config={"how": how})
    server.add("typed", "acme/typed", config={"numbre": 1})
    server.add("died", "acme/die")
    server.add("unknown", "acme/other")
    async with serving(worker):
        found = {
            name: await asyncio.to_thread(server.end, name)
            for name in ("final", "later", "exit", "wrong", "else", "typed", "died", "unknown")
        }
    assert (found["final"]["error"], found["final"]["retry"]) == (
        {"code": "image-missing", "message": "No such image."},
        False,
    )
    assert found["later"]["retry"] == {"afterSeconds": 30}
    assert (found["else"]["error"]["message"], found["else"]["retry"]) == ("ValueError: a surprise", True)
    assert found["exit"]["error"]["message"] == "SystemExit: 3"
    assert (found["wrong"]["error"]["code"], found["wrong"]["retry"]) == ("invalid-output", False)
    assert (found["typed"]["error"]["code"], found["typed"]["retry"]) == ("invalid-config", False)
    assert found["died"]["error"] == {"code": "process-died", "message": "The process ended with code -9"}
    assert found["unknown"]["kind"] == "release"
    logged = [line["message"] for item in server.items if item["kind"] == "log" for line in item["lines"]]
    assert any("ValueError: a surprise" in message and "Traceback" in message for message in logged)


async def test_large_values_are_sent_apart(server: TaskServerDouble) -> None:
    worker = new_worker(server)

    @worker.node("acme/work", "1.0.0")
    def work(task: Task) -> Any:  # noqa: ANN401 - any output
        return task.input * 2

    server.blobs["/api/v1/tasks/large/input"] = "x" * 200_000
    server.add("large", input={"$blob": {"bytes": 200_000}})
    server.lose_values = 2  # the answers to both are lost once
    async with serving(worker):
        assert (await asyncio.to_thread(server.end, "large"))["output"] == {"$blob": {}}
        assert server.lose_values == 0
        assert server.blobs["/api/v1/tasks/large/output"] == "x" * 400_000
        # No repetition makes an output smaller.
        server.largest_output = 300_000
        server.add("larger", input="x" * 200_000)
        refused = await asyncio.to_thread(server.end, "larger")
    assert (refused["error"]["code"], refused["retry"]) == ("result-too-large", False)


@pytest.mark.parametrize("knows_leases", [True, False])
async def test_a_cancelled_or_lost_task_stops_wherever_it_runs(
    server: TaskServerDouble, *, knows_leases: bool
) -> None:
    worker, seen = new_worker(server), dict[str, BaseException]()

    @worker.node("acme/thread", "1.0.0")
    def in_thread(task: Task) -> None:
        try:
            task.sleep(60)
        except TaskCancelled as error:
            seen[task.id] = error
            raise

    @worker.node("acme/loop", "1.0.0")
    async def on_loop() -> None:
        await asyncio.sleep(60)

    worker.node("acme/hang", "1.0.0", process=True)(worker_nodes.hang)
    kinds = {"thread": "acme/thread", "loop": "acme/loop", "process": "acme/hang"}
    for name, kind in kinds.items():
        server.add(name, kind, leaseSeconds=300)
    server.add("lost", "acme/thread", leaseSeconds=3)
    server.knows_leases = knows_leases
    async with serving(worker):
        await asyncio.to_thread(server.wait_until, lambda: len(server.reports) > 0 and not server.waiting)
        server.lost.add("lost")
        with server.changed:
            server.cancel = [*kinds]
            server.changed.notify_all()
        for name in kinds:
            # The next heartbeat is 100 seconds away.
            assert (await asyncio.to_thread(server.end, name))["kind"] == "release"
        await asyncio.to_thread(server.wait_until, lambda: "lost" in server.final)
    assert (type(seen["thread"]), type(seen["lost"])) == (TaskCancelled, LeaseLost)


@pytest.mark.parametrize("kind", ["thread", "loop", "process"])
async def test_an_attempt_ends_at_its_deadline_and_the_worker_begins_the_next_one(
    server: TaskServerDouble, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker, is_free = new_worker(server, slots=2), threading.Event()

    @worker.node("acme/thread", "1.0.0")
    def in_thread(task: Task) -> int:
        if task.attempt == 1:
            is_free.wait()  # deaf to its end
        return task.attempt

    @worker.node("acme/loop", "1.0.0")
    async def on_loop(task: Task) -> int:
        await asyncio.sleep(600 if task.attempt == 1 else 0)
        return task.attempt

    worker.node("acme/process", "1.0.0", process=True)(worker_nodes.hang_once)
    server.add("t", f"acme/{kind}", lease="lease-1", timeoutSeconds=0.3)
    async with serving(worker):
        if kind == "thread":
            await asyncio.to_thread(server.wait_until, lambda: "in in_thread" in caplog.text)
        else:
            first = await asyncio.to_thread(server.end, "t")
            assert (first["lease"], first["kind"], first["error"]["code"]) == ("lease-1", "fail", "timeout")
        server.add("t", f"acme/{kind}", lease="lease-2", attempt=2, timeoutSeconds=600)
        await asyncio.to_thread(server.wait_until, lambda: server.final.get("t", [{}])[-1].get("output") == 2)
        assert server.final["t"][-1]["lease"] == "lease-2"
        is_free.set()


async def test_tasks_of_a_long_poll_begin_once_their_leases_are_renewed(
    server: TaskServerDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_channel, "FRESH_SECONDS", 0.0)  # each answer may have waited in a frozen worker
    worker, begun = new_worker(server), list[str]()

    @worker.node("acme/work", "1.0.0")
    def work(task: Task) -> None:
        begun.append(task.id)

    server.lost.add("lease-stale")
    server.add("stale")
    server.add("fresh")
    async with serving(worker):
        assert (await asyncio.to_thread(server.end, "fresh"))["kind"] == "complete"
        assert (await asyncio.to_thread(server.end, "stale"))["kind"] == "release"
    assert begun == ["fresh"]
    assert [item["kind"] for item in server.items if item["id"] == "fresh"] == ["heartbeat", "complete"]


async def test_every_slot_taken_leaves_a_poll_open_for_cancels(server: TaskServerDouble) -> None:
    worker = new_worker(server, slots=1)

    @worker.node("acme/work", "1.0.0")
    def work(task: Task) -> None:
        task.sleep(60)

    server.add("one")
    server.add("two")
    async with serving(worker):
        await asyncio.to_thread(server.wait_until, lambda: len(server.waiting) == 1)
        with server.changed:
            server.cancel = ["one"]
            server.changed.notify_all()
        assert (await asyncio.to_thread(server.end, "one"))["kind"] == "release"
        await asyncio.to_thread(server.wait_until, lambda: not server.waiting)
        worker.stop()
        worker.stop()
    assert server.final["two"][-1]["kind"] == "release"


async def test_lost_answers_neither_lose_nor_repeat_a_task(server: TaskServerDouble) -> None:
    worker, done = new_worker(server), list[str]()

    @worker.node("acme/work", "1.0.0")
    def work(task: Task) -> None:
        done.append(task.id)

    server.lose_answers = 3
    for number in range(20):
        server.add(f"t{number}")
    async with serving(worker):
        for number in range(20):
            await asyncio.to_thread(server.end, f"t{number}")
    assert sorted(done) == sorted(f"t{number}" for number in range(20))
    named = {attempt["id"] for report in server.reports for attempt in report["held"]}
    assert named == {f"t{number}" for number in range(20)}


@pytest.mark.parametrize("is_older", [True, False], ids=["refused-by-an-older-server", "cut-by-a-proxy"])
async def test_polls_are_short_where_long_ones_fail(
    server: TaskServerDouble, monkeypatch: pytest.MonkeyPatch, *, is_older: bool
) -> None:
    worker = new_worker(server)

    @worker.node("acme/work", "1.0.0")
    def work() -> str:
        return "done"

    if is_older:
        server.longest_wait = 60
    else:
        monkeypatch.setattr(task_channel, "CUT_SECONDS", 0.0)  # every failure may be a cut
        monkeypatch.setattr(task_channel, "FIRST_SHORT_POLLS_SECONDS", 600.0)  # longer than this test
        server.lose_answers = 1
    server.add("t")
    async with serving(worker):
        assert (await asyncio.to_thread(server.end, "t"))["kind"] == "complete"
    assert server.waits[:2] == [task_channel.POLL_SECONDS, task_channel.SHORT_POLL_SECONDS]
    assert set(server.waits[1:]) == {task_channel.SHORT_POLL_SECONDS}


async def test_polls_are_long_again_soon_after_a_server_has_restarted(
    server: TaskServerDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_worker(server)

    @worker.node("acme/work", "1.0.0")
    def work() -> str:
        return "done"

    monkeypatch.setattr(task_channel, "CUT_SECONDS", 0.0)  # the open poll of a restarted server is old
    monkeypatch.setattr(task_channel, "FIRST_SHORT_POLLS_SECONDS", 0.001)  # over before the poll is repeated
    server.lose_answers = 1
    server.add("t")
    async with serving(worker):
        assert (await asyncio.to_thread(server.end, "t"))["kind"] == "complete"
    assert set(server.waits) == {task_channel.POLL_SECONDS}


async def test_answers_of_others_are_no_answers(
    server: TaskServerDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy may answer with a status of its own, such as 200 and `{"status": "maintenance"}`."""
    worker, answer, replaced = new_worker(server), server.answer, Counter[str]()

    @worker.node("acme/work", "1.0.0")
    def work() -> str:
        return "done"

    def answer_others_first(path: str, body: Any, headers: Mapping[str, str]) -> Any:  # noqa: ANN401 - any JSON
        replaced[path] += 1
        # Otherwise the open poll would last until its end.
        is_replaced = replaced[path] == 1 and not path.endswith("/stop")
        return {"status": "maintenance"} if is_replaced else answer(path, body, headers)

    monkeypatch.setattr(server, "answer", answer_others_first)
    server.add("t")
    async with serving(worker):
        report = await asyncio.to_thread(server.end, "t")
    assert (report["kind"], report["output"]) == ("complete", "done")


async def test_a_drain_waits_for_running_functions_and_gives_back_the_rest(server: TaskServerDouble) -> None:
    worker = new_worker(server, grace=1.0)
    started, may_end = threading.Event(), threading.Event()

    @worker.node("acme/short", "1.0.0")
    def short() -> None:
        started.set()
        may_end.wait(30)

    @worker.node("acme/long", "1.0.0")
    def endless() -> None:
        threading.Event().wait(60)

    server.add("short", "acme/short")
    server.add("long", "acme/long")
    async with serving(worker):
        await asyncio.to_thread(started.wait, 30)
        await asyncio.to_thread(server.wait_until, lambda: not server.waiting)
        worker.stop()
        await asyncio.to_thread(server.wait_until, lambda: server.is_stopped)
        server.add("late", "acme/short")
        may_end.set()
    assert server.final["short"][-1]["kind"] == "complete"
    assert server.final["long"][-1]["kind"] == "release"
    assert "late" not in server.final


async def test_progress_and_checkpoints_reach_the_server_while_a_function_runs(
    server: TaskServerDouble,
) -> None:
    worker, may_end = new_worker(server), threading.Event()

    @worker.node("acme/work", "1.0.0")
    def work(task: Task) -> Any:  # noqa: ANN401 - any output
        logging.getLogger("shop").warning("began after %s", task.checkpoint)
        task.progress(3, 9, "tiles")
        task.checkpoint = {"tile": 3}
        may_end.wait(30)

    server.add("t", checkpoint={"tile": 2}, attempt=2)
    async with serving(worker):
        await asyncio.to_thread(server.wait_until, lambda: any("checkpoint" in item for item in server.items))
        may_end.set()
        await asyncio.to_thread(server.end, "t")
    (told,) = [item for item in server.items if "checkpoint" in item]
    assert told["checkpoint"] == {"tile": 3}
    assert told["progress"] == {"done": 3, "total": 9, "message": "tiles"}
    (line,) = [one for item in server.items if item["kind"] == "log" for one in item["lines"]]
    assert (line["level"], line["message"]) == ("warning", "began after {'tile': 2}")


async def test_a_report_that_is_refused_fails_its_own_task_alone(server: TaskServerDouble) -> None:
    worker, all_run = new_worker(server, slots=4), threading.Barrier(4)
    server.refused_text = "poison"

    @worker.node("acme/work", "1.0.0")
    def work(task: Task) -> Any:  # noqa: ANN401 - any output
        all_run.wait(30)
        if task.id == "logs":
            task.log("poison")
        return {"text": "poison" if task.id == "bad" else "good"}

    for name in ("bad", "logs", "good", "also"):
        server.add(name)
    async with serving(worker):
        found = {name: await asyncio.to_thread(server.end, name) for name in ("bad", "logs", "good", "also")}
    assert [found[name]["kind"] for name in ("logs", "good", "also")] == ["complete"] * 3
    assert (found["bad"]["error"]["code"], found["bad"]["retry"]) == ("report-refused", False)


async def test_many_outputs_are_reported_in_several_parts(server: TaskServerDouble) -> None:
    worker, all_run = new_worker(server, slots=40), threading.Barrier(40)

    @worker.node("acme/work", "1.0.0")
    def work() -> Any:  # noqa: ANN401 - any output
        all_run.wait(30)
        return "x" * 250_000

    for number in range(40):
        server.add(f"t{number}")
    async with serving(worker):
        for number in range(40):
            assert (await asyncio.to_thread(server.end, f"t{number}"))["kind"] == "complete"
    assert 1_000_000 < server.largest_report < 5_000_000


@pytest.mark.parametrize("is_process", [False, True], ids=["thread", "process"])
async def test_values_that_json_cannot_hold_fail_where_they_are_given(
    server: TaskServerDouble, *, is_process: bool
) -> None:
    worker = new_worker(server)
    worker.node("acme/work", "1.0.0", process=is_process)(worker_nodes.give_odd_values)
    server.add("t")
    async with serving(worker):
        found = await asyncio.to_thread(server.end, "t")
    assert found["error"] == {
        "code": "odd",
        "message": "TypeError ValueError ValueError ValueError ValueError",
    }
    # The next attempt gets the checkpoint as it was set, although this one has failed at once.
    assert [one["kind"] for one in server.items] in (
        ["log", "heartbeat", "fail"],
        ["heartbeat", "log", "fail"],
    )
    assert [one["checkpoint"] for one in server.items if "checkpoint" in one] == [{"done": [1]}]
    (line,) = [line["message"] for item in server.items if item["kind"] == "log" for line in item["lines"]]
    assert line == "a?b"


async def test_a_blocked_loop_is_logged_with_its_place(
    server: TaskServerDouble, caplog: pytest.LogCaptureFixture
) -> None:
    worker = new_worker(server)

    @worker.node("acme/work", "1.0.0")
    async def work() -> None:
        time.sleep(1.8)  # noqa: ASYNC251 - the mistake that is found

    server.add("t")
    async with serving(worker):
        await asyncio.to_thread(server.end, "t")
    (record,) = [one for one in caplog.records if "blocks the event loop" in one.message]
    assert "time.sleep(1.8)" in record.message


# ── definitions ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_decorated_function_becomes_a_node_type(server: TaskServerDouble) -> None:
    worker = new_worker(server)

    @worker.node("acme/resize", "1.2.0", effect="read", timeout=120, retry=3, ports=["output", "small"])
    def resize(config: Resize, task: Task) -> Resized:
        """Scale an image.

        Details.
        """
        raise NotImplementedError

    assert worker.register() == ["acme/resize 1.2.0"]
    assert server.node_types == [
        {
            "type": "acme/resize",
            "version": "1.2.0",
            "name": "Resize",
            "category": "custom",
            "description": "Scale an image.",
            "effect": "read",
            "ports": {"inputs": ["input"], "outputs": ["output", "small"]},
            "config": {
                "type": "object",
                "required": ["image"],
                "additionalProperties": False,
                "properties": {
                    "image": {"type": "string"},
                    "width": {
                        "type": "integer",
                        "minimum": 1,
                        "description": "Width in pixels.",
                        "default": 1200,
                    },
                    "mode": {"enum": ["fit", "fill"], "default": "fit"},
                    "tags": {"type": "array", "items": {"type": "string"}, "default": []},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
                },
            },
            "output": {
                "schema": {
                    "type": "object",
                    "required": ["url"],
                    "additionalProperties": False,
                    "properties": {"url": {"type": "string"}},
                }
            },
            "task": {"timeoutSeconds": 120, "retry": {"maxAttempts": 3}},
        }
    ]


class StructConfig(msgspec.Struct):
    """Config of msgspec."""

    rows: int
    name: str = "x"


class ModelConfig(pydantic.BaseModel):
    """Config of pydantic."""

    rows: int
    name: str = "x"


@pytest.mark.parametrize("kind", [StructConfig, ModelConfig], ids=["msgspec", "pydantic"])
def test_configs_may_be_structs_and_models(kind: Any) -> None:  # noqa: ANN401 - a class
    schema = schemas.schema_of(kind)
    assert (schema["type"], schema["required"]) == ("object", ["rows"])
    assert schemas.from_json(kind, {"rows": 2}).rows == 2
    with pytest.raises((ValueError, msgspec.ValidationError)):
        schemas.from_json(kind, {"rows": "two"})
    assert schemas.to_json(schemas.from_json(kind, {"rows": 2})) == {"rows": 2, "name": "x"}


class Outer(pydantic.BaseModel):
    """Model of models, whose field has the name of a keyword."""

    discriminator: ModelConfig = ModelConfig(rows=3)
    either: ModelConfig | int


class Endless(pydantic.BaseModel):
    """Model that contains itself."""

    next: Endless | None = None


@dataclass
class Mixed:
    """Class of classes of all kinds."""

    outer: Outer
    structs: list[StructConfig]


def test_classes_inside_of_others_have_no_references() -> None:
    schema = schemas.schema_of(Mixed)
    assert "$" not in str(schema)
    fields = schema["properties"]["outer"]["properties"]
    assert fields["discriminator"]["required"] == ["rows"]
    assert fields["either"]["anyOf"][0]["properties"]["rows"]["type"] == "integer"
    assert schema["properties"]["structs"]["items"]["properties"]["name"]["default"] == "x"
    found = schemas.from_json(Mixed, {"outer": {"either": {"rows": 1}}, "structs": [{"rows": 2}]})
    assert (found.outer.either.rows, found.structs[0].rows) == (1, 2)
    with pytest.raises(TypeError, match="Endless contains itself"):
        schemas.schema_of(Endless)


@pytest.mark.parametrize(
    ("type_name", "version", "options", "told"),
    [
        ("resize", "1.0.0", {}, "namespace of 2 to 39"),
        ("acme/resize", "1.0", {}, "three numbers"),
        ("acme/resize", "1.0.0", {"effect": "some"}, "effect must be"),
    ],
)
def test_a_wrong_definition_is_refused_where_it_is_made(
    type_name: str, version: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        Worker(url="http://x", api_key="k").node(type_name, version, **options)(worker_nodes.hang)


@dataclass
class AnyDataclass:
    """Dataclass with fields for any JSON."""

    value: object
    values: dict[str, object]


class AnyStruct(msgspec.Struct):
    """Struct with fields for any JSON."""

    value: object
    values: dict[str, object]


class AnyModel(pydantic.BaseModel):
    """Model with fields for any JSON."""

    value: object
    values: dict[str, object]


@pytest.mark.parametrize("kind", [AnyDataclass, AnyStruct, AnyModel])
def test_an_object_is_any_json(kind: Any) -> None:  # noqa: ANN401 - a class
    assert schemas.schema_of(kind)["required"] == ["value", "values"]
    value = {"value": [1, None], "values": {"a": "x"}}
    assert schemas.to_json(schemas.from_json(kind, value)) == value


@dataclass
class WrongDataclass:
    """Dataclass with a field that JSON can't hold."""

    rows: int
    event: list[threading.Event]


class WrongStruct(msgspec.Struct):
    """Struct with a field that JSON can't hold."""

    rows: int
    event: list[threading.Event]


class WrongModel(pydantic.BaseModel, arbitrary_types_allowed=True):
    """Model with a field that JSON can't hold."""

    rows: int
    event: list[threading.Event]


@pytest.mark.parametrize("kind", [WrongDataclass, WrongStruct, WrongModel])
def test_the_error_names_the_field_that_json_cannot_hold(kind: Any) -> None:  # noqa: ANN401 - a class
    with pytest.raises(TypeError, match=rf"{kind.__name__}\.event: .* has no JSON Schema"):
        schemas.schema_of(kind)


def test_a_config_may_be_annotated_as_object() -> None:
    def run(config: object) -> object:
        return config

    worker = Worker(url="http://x", api_key="k")
    worker.node("acme/any", "1.0.0")(run)
    assert worker.definitions[0].document["config"] == {"type": "object"}


def test_the_code_of_a_newer_minor_version_serves_older_tasks() -> None:
    worker = Worker(url="http://x", api_key="k")
    for version in ("1.1.0", "1.3.0", "2.0.0"):
        worker.node("acme/work", version)(worker_nodes.count)
    serving_versions = {
        wanted: [one.version for one in worker.definitions if one.serves(wanted)]
        for wanted in ("1.0.0", "1.2.0", "1.4.0", "2.0.0")
    }
    assert serving_versions == {
        "1.0.0": ["1.1.0", "1.3.0"],
        "1.2.0": ["1.3.0"],
        "1.4.0": [],
        "2.0.0": ["2.0.0"],
    }


def test_run_node_calls_a_function_without_a_server() -> None:
    result = run_node(worker_nodes.count, worker_nodes.Counted(2), input={"a": 1})
    assert result.output["input"] == {"a": 1}
    assert (result.port, result.checkpoint, [one["message"] for one in result.lines]) == (
        "output",
        1,
        ["at 0", "at 1"],
    )
    assert result.progress == {"done": 2, "total": 2, "message": "counting"}
    with pytest.raises(TaskCancelled):
        run_node(worker_nodes.count, worker_nodes.Counted(2), cancelled=True)


async def test_the_span_of_a_node_is_current_while_its_function_runs(server: TaskServerDouble) -> None:
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    worker = new_worker(server)

    def show() -> dict[str, str]:
        span = trace.get_current_span().get_span_context()
        return {"trace": f"{span.trace_id:032x}", "span": f"{span.span_id:016x}"}

    @worker.node("acme/thread", "1.0.0")
    def in_thread() -> dict[str, str]:
        return show()

    @worker.node("acme/loop", "1.0.0")
    async def on_loop(task: Task) -> dict[str, str]:
        return {**show(), "given": str(task.traceparent)}

    traceparent = f"00-{trace_id}-{span_id}-01"
    for name in ("thread", "loop"):
        server.add(name, f"acme/{name}", traceparent=traceparent)
    server.add("untraced", "acme/thread")
    async with serving(worker):
        ends = {
            name: (await asyncio.to_thread(server.end, name))["output"]
            for name in ("thread", "loop", "untraced")
        }
    assert ends["thread"] == {"trace": trace_id, "span": span_id}
    assert ends["loop"] == {"trace": trace_id, "span": span_id, "given": traceparent}
    assert ends["untraced"]["trace"] == "0" * 32


async def test_many_log_lines_are_sent_in_several_reports_before_the_end(
    server: TaskServerDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_tasks, "MAX_LINES", 20)
    monkeypatch.setattr(held_tasks, "MAX_REPORT_LINES", 2_000)
    worker, count = new_worker(server), 23_000

    @worker.node("acme/chatty", "1.0.0")
    def chat(task: Task) -> dict[str, int]:
        for number in range(count):
            task.log(str(number))
        return {"lines": count}

    server.add("t1", "acme/chatty")
    async with serving(worker):
        end = await asyncio.to_thread(server.end, "t1")
    assert end["output"] == {"lines": count}
    items = [one for one in server.items if one["id"] == "t1"]
    lines = [line["message"] for one in items if one["kind"] == "log" for line in one["lines"]]
    assert lines == [str(number) for number in range(count)]
    assert items[-1]["kind"] == "complete"


def test_lines_are_taken_by_number_and_size() -> None:
    task = Task({"id": "t", "type": "acme/a", "version": "1.0.0"})
    for size in (5, 5, 20, 3):
        task.log("x" * size)
    taken = [len(task.take_lines(2, 10)), len(task.take_lines(9, 10)), len(task.take_lines(9, 10))]
    assert (taken, task.has_lines) == ([2, 1, 1], False)
