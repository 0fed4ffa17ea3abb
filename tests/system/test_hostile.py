"""Hostile graphs and data: each ends at the limit that its error names, without slowing neighbors on the same
worker.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import psutil
import pytest

from concurrency import gc_tuning
from models.access import KeyScope, UserRole
from models.execution_status import TERMINAL_STATUSES
from models.settings import ServerSettings
from pilotflame import accounts
from tests.system import harness, workflow_shapes
from tests.system.client import RetryingClient
from tests.system.wait_conditions import wait_until
from tests.system.workflow_shapes import START, build_workflow, chain_workflow, set_node

if TYPE_CHECKING:
    import httpx2

    from engine.values import Json
    from tests.system.harness import OneProcess

Workflow: TypeAlias = "dict[str, Json]"

LONGEST_DELAY_SECONDS = 9.5
"""Longest duration of the neighbor's run, from the request to the answer, without the time for which other programs
had the processors: a second, plus a margin for a slow disk.
"""
PROBE_SECONDS = 0.5
"""Pause of the neighbor between its runs: a server that stands still for ten seconds delays one by 9.5 at least."""
SANE_BYTES = 500 << 20
COLLECTION_SECONDS = 8 * gc_tuning.REMEMBERED_CHECKS * gc_tuning.CHECK_SECONDS
"""Time for a full garbage collection: it waits until the heap has not grown for 60 s, and until the runs of the
neighbor have created enough objects, which takes longer on a busy machine.
"""
END_SECONDS = 60.0
SHORT_SECONDS = 0.2
"""Time limit of what has no end: the processors are busy throughout."""
SMALL = {
    "MAX_OUTPUT_BYTES": "7000000",  # above the largest body and the largest answer that are taken in
    "MAX_LOOP_ITEMS": "1000",
    "MAX_ITERATIONS": "3000",
    "MAX_RUN_DEPTH": "4",
    "MAX_SUB_RUNS": "12",
    "CONCURRENCY": "20",
}
ELEMENTS = 250_000
"""Length of a list that is made in a thread, not on the event loop."""
LONGEST_LIST = 1_000_000


# ── the world ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class NeighborOrganization:
    """Another organization, which runs the same small workflow again and again."""

    client: RetryingClient
    process_ids: Sequence[int]
    """The server's process and that of the tests."""
    workflow_id: str = ""
    delays: list[float] = field(default_factory=list)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def live(self) -> None:
        while True:
            await self.run()
            await asyncio.sleep(PROBE_SECONDS)

    async def run(self) -> None:
        """Run the workflow to its end, after the run in hand, and note the delay."""
        async with self._turn:
            began_at, waited = time.monotonic(), self._read_processor_waits()
            ended = await self.client.end(await self.client.execute(self.workflow_id), within=END_SECONDS)
            self.delays.append(time.monotonic() - began_at - (self._read_processor_waits() - waited))
            assert ended.status == "completed"

    def _read_processor_waits(self) -> float:
        """Return for how many seconds the event loops of both processes could run, but had no processor.

        0 where the system does not count that.
        """
        nanoseconds = 0
        for process_id in self.process_ids:
            with suppress(FileNotFoundError):
                nanoseconds += int(Path(f"/proc/{process_id}/schedstat").read_text().split()[1])
        return nanoseconds / 1e9


@dataclass
class SharedServer:
    """Server in one process, shared by attackers and their neighbors."""

    deployment: OneProcess
    client: RetryingClient
    neighbour: NeighborOrganization
    folder: Path
    upstream: str = ""

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.deployment.gateway.process_id)

    async def asked(self, method: str, path: str, body: Json = None) -> httpx2.Response:
        return await self.client.send(method, path, body)

    async def failure(self, graph: Mapping[str, Json], inputs: Mapping[str, Json] | None = None) -> str:
        """Have a graph run to its failure; returns the code and message of the node, or of the run, that failed."""
        execution_id = await self.client.execute(await self.client.create(graph), inputs)
        ended = await self.client.end(execution_id, within=END_SECONDS)
        assert ended.status == "failed", ended
        spans = (await self.asked("GET", f"/executions/{execution_id}/spans?status=failed")).json()["spans"]
        failed = [span["error"] for span in spans if span.get("error")]
        error = failed[0] if failed else (await self.client.progress(execution_id))["error"]
        return f"{error['code']}: {error['message']}"

    async def all_fail(self, attacks: Iterable[tuple[Workflow, Mapping[str, Json], str]]) -> None:
        """Run graphs at the same time, each to its expected failure."""
        attacks = list(attacks)
        found = await asyncio.gather(*(self.failure(graph, inputs) for graph, inputs, _ in attacks))
        assert not [
            (text, expected)
            for text, (_, _, expected) in zip(found, attacks, strict=True)
            if expected not in text
        ]

    async def completes(
        self, graph: Mapping[str, Json], inputs: Mapping[str, Json] | None = None
    ) -> Mapping[str, Any]:
        """Have a graph run to its end; returns the outputs of its leaves."""
        execution_id = await self.client.execute(await self.client.create(graph), inputs)
        ended = await self.client.end(execution_id, within=END_SECONDS)
        assert ended.status == "completed", ended
        return ended.outputs

    async def refusal(self, graph: Mapping[str, Json]) -> str:
        """Check that a graph is refused before it is saved; return the answer."""
        response = await self.asked("POST", "/workflows", dict(graph))
        assert response.is_client_error, response.text
        return response.text


@pytest.fixture(scope="module")
async def shared_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SharedServer]:
    folder = tmp_path_factory.mktemp("hostile")
    async with harness.run_one_process(folder, **SMALL) as deployment, serve_answers() as upstream:
        client = RetryingClient(deployment.url)
        response = await client.answer("GET", "/auth/whoami")  # the first organization is there
        assert response.status_code == HTTPStatus.OK
        neighbour = NeighborOrganization(
            RetryingClient(deployment.url, key=await _key_of_another(deployment, folder)),
            [deployment.gateway.process_id, os.getpid()],
        )
        neighbour.workflow_id = await neighbour.client.create(chain_workflow(set_node("done")))
        life = asyncio.create_task(neighbour.live())
        yield SharedServer(deployment, client, neighbour, folder, upstream)
        life.cancel()
        with suppress(asyncio.CancelledError):
            await life
        await client.close()
        await neighbour.client.close()


async def _key_of_another(deployment: OneProcess, folder: Path) -> str:
    secret = deployment.gateway.environment["PILOTFLAME_SECRET_KEY"]
    settings = ServerSettings.model_validate({"data_dir": folder, "secret_key": secret})
    organization_id = await accounts.create_organization(settings, "Neighbours")
    await accounts.create_user(settings, organization_id, "n@example.com", "Neighbour", UserRole.ADMIN)
    return await accounts.create_key(settings, organization_id, "n@example.com", "key", list(KeyScope), None)


@pytest.fixture(autouse=True)
async def _has_no_waiters(shared_server: SharedServer) -> AsyncIterator[None]:
    """Check that the neighbor's runs complete as usual, during each test and right after it."""
    delays = shared_server.neighbour.delays
    delays.clear()
    yield
    await shared_server.neighbour.run()
    assert max(delays) < LONGEST_DELAY_SECONDS


def make_node(node_id: str, type: str, **config: Json) -> dict[str, Json]:  # noqa: A002 - the field's own word
    return {"id": node_id, "nodeId": type, "config": config}


def make_operation(name: str, *args: Json) -> Json:
    return {"$op": name, "args": [*args]}


NUMBERS = make_node("numbers", "set", values={"all": make_operation("range", ELEMENTS)})


def computing_workflow(value: Json, *before: workflow_shapes.Node) -> Workflow:
    """Return a workflow that computes one value after the nodes `before`, whose outputs it may use."""
    return chain_workflow(*before, make_node("bomb", "set", values={"value": value}))


def condition_workflow(condition: Json) -> Workflow:
    return chain_workflow(NUMBERS, make_node("bomb", "conditional", condition=condition))


def limit_seconds(expected: str) -> float:
    """Return a time limit that only an endless run exceeds, on a busy machine too."""
    return SHORT_SECONDS if expected in {"timeout: ", "timed-out"} else END_SECONDS


def code_workflow(source: str, expected: str) -> Workflow:
    config: dict[str, Json] = {"timeoutSeconds": limit_seconds(expected), "maxMemoryMb": 32}
    return chain_workflow(make_node("bomb", "code", source=source, **config))


# ── graphs ──────────────────────────────────────────────────────────────────────────────────────────────────


def ladder_workflow(rungs: int, *, hands_on: bool) -> Workflow:
    """Return a graph with 2^n paths: each rung is two nodes with the outputs of both nodes of the rung above."""
    nodes, edges, above = [START], [], ["start"]
    for rung in range(rungs):
        pair = [f"left{rung}", f"right{rung}"]
        nodes += [set_node(one) if hands_on else make_node(one, "template", text="step") for one in pair]
        edges += [f"{upper}>{lower}" for upper in above for lower in pair]
        above = pair
    return build_workflow(nodes, " ".join(edges))


async def test_a_cycle_is_refused(shared_server: SharedServer) -> None:
    graph = build_workflow([START, set_node("one"), set_node("two")], "start>one one>two two>one")
    assert "The connections form a cycle" in await shared_server.refusal(graph)


async def test_one_node_more_than_the_limit_is_refused(shared_server: SharedServer) -> None:
    graph = build_workflow([START, *(set_node(f"n{number}") for number in range(10_000))], "")
    assert "10000" in await shared_server.refusal(graph)


async def test_data_that_doubles_at_each_join_ends_in_the_limit_of_an_output(
    shared_server: SharedServer,
) -> None:
    assert "output-too-large: " in (failed := await shared_server.failure(ladder_workflow(40, hands_on=True)))
    assert "PILOTFLAME_MAX_OUTPUT_BYTES" in failed


async def test_ten_thousand_nodes_with_2_to_the_5000_ways_through_them_are_each_run_once(
    shared_server: SharedServer,
) -> None:
    await shared_server.completes(ladder_workflow(4_990, hands_on=False))


async def test_many_long_runs_of_one_organisation_leave_room_for_another(shared_server: SharedServer) -> None:
    graph = chain_workflow(*(make_node(f"n{number}", "template", text="step") for number in range(150)))
    workflow_id = await shared_server.client.create(graph)
    executions = [await shared_server.client.execute(workflow_id) for _ in range(30)]
    for execution_id in executions:
        assert (await shared_server.client.end(execution_id, within=END_SECONDS)).status == "completed"


# ── runs of runs, and loops ─────────────────────────────────────────────────────────────────────────────────


async def _create_call_circle(
    shared_server: SharedServer, count: int, *nodes: workflow_shapes.Node, edges: str = ""
) -> str:
    """Return the first of workflows that call one another in a circle."""
    ids = [await shared_server.client.create(chain_workflow(set_node("done"))) for _ in range(count)]
    for caller, called in zip(ids, [*ids[1:], ids[0]], strict=True):
        call = make_node("call", "sub-workflow", workflowId=called)
        graph = build_workflow([START, *nodes, call], edges) if nodes else chain_workflow(call)
        response = await shared_server.asked("PUT", f"/workflows/{caller}", graph)
        assert response.status_code == HTTPStatus.OK, response.text
    return ids[0]


@pytest.mark.parametrize("count", [1, 2])
async def test_workflows_that_call_themselves_or_one_another_end_in_the_limit_of_depth(
    shared_server: SharedServer, count: int
) -> None:
    execution_id = await shared_server.client.execute(await _create_call_circle(shared_server, count))
    assert (await shared_server.client.end(execution_id, within=END_SECONDS)).status == "failed"
    runs = await _read_run_chain(shared_server, execution_id)
    assert len(runs) == 1 + int(SMALL["MAX_RUN_DEPTH"])
    assert "PILOTFLAME_MAX_RUN_DEPTH" in runs[-1]["error"]["message"]


async def test_a_loop_that_calls_its_own_workflow_ends_in_the_limit_of_runs(
    shared_server: SharedServer,
) -> None:
    items: Json = [*range(5)]
    loop = make_node("loop", "loop", items=items, concurrency=5)
    workflow_id = await _create_call_circle(shared_server, 1, loop, edges="start>loop loop:continue>call")
    execution_id = await shared_server.client.execute(workflow_id)
    assert (await shared_server.client.end(execution_id, within=END_SECONDS)).status == "failed"

    async def runs() -> list[dict[str, Any]] | None:
        listed = await shared_server.asked("GET", f"/executions?workflow_id={workflow_id}&limit=100")
        found: list[dict[str, Any]] = listed.json()["executions"]
        return found if {run["status"] for run in found} <= TERMINAL_STATUSES else None

    assert len(await wait_until(runs, what="nothing of it runs any more")) == 1 + int(SMALL["MAX_SUB_RUNS"])


async def _read_run_chain(shared_server: SharedServer, execution_id: str) -> list[dict[str, Any]]:
    """Return a run, the sub-workflow run that it started, and so on."""
    line = []
    while True:
        line.append((await shared_server.asked("GET", f"/executions/{execution_id}")).json())
        children = (await shared_server.asked("GET", f"/executions?parent_id={execution_id}")).json()[
            "executions"
        ]
        if not children:
            return line
        (child,) = children
        execution_id = child["id"]


async def test_loops_end_in_their_limits_of_items_and_of_turns(shared_server: SharedServer) -> None:
    def loops(*counts: int) -> Workflow:
        nodes = [make_node(f"loop{depth}", "loop", items=[0] * count) for depth, count in enumerate(counts)]
        edges = [
            "start>loop0",
            *(f"loop{depth}:continue>loop{depth + 1}" for depth in range(len(counts) - 1)),
        ]
        last = f"loop{len(counts) - 1}"
        return build_workflow(
            [START, *nodes, make_node("body", "template", text="turn")],
            " ".join([*edges, f"{last}:continue>body"]),
        )

    many = await shared_server.failure(loops(1_001))
    nested = await shared_server.failure(loops(60, 60))
    assert many.startswith("too-many-items: ")
    assert "PILOTFLAME_MAX_LOOP_ITEMS" in many
    assert nested.startswith("too-many-iterations: ")
    assert "PILOTFLAME_MAX_ITERATIONS" in nested


# ── expressions ─────────────────────────────────────────────────────────────────────────────────────────────

ALL = "{{ nodes.numbers.all }}"
TOO_MUCH = "more than 10,000,000 characters or elements"
DEEP: Json = "x"
for _ in range(70):
    DEEP = [DEEP]


BOMBS = (
    (computing_workflow([make_operation("length", make_operation("unique", ALL))] * 400, NUMBERS), TOO_MUCH),
    (
        computing_workflow(
            [make_operation("length", make_operation("from-json", make_operation("to-json", ALL)))] * 9,
            NUMBERS,
        ),
        TOO_MUCH,
    ),
    (computing_workflow([make_operation("length", make_operation("sort", ALL))] * 400, NUMBERS), TOO_MUCH),
    (computing_workflow([make_operation("range", LONGEST_LIST)] * 9), "output-too-large"),
    (computing_workflow(make_operation("concat", *[make_operation("pad", "x", 1_000_000)] * 50)), TOO_MUCH),
    (
        computing_workflow(
            make_operation(
                "replace", make_operation("pad", "", 5_000, "x"), "x", make_operation("pad", "", 5_000)
            )
        ),
        "10,000,000 characters",
    ),
    (computing_workflow(f"{ALL} " * 8, NUMBERS), TOO_MUCH),
    (computing_workflow(make_operation("multiply", 1e308, 10)), "too large"),
    (computing_workflow(make_operation("range", 10**12)), "1,000,000 elements"),
    (condition_workflow({"any": [{"left": ALL, "operator": "contains", "right": -1}] * 1_000}), TOO_MUCH),
    (condition_workflow({"all": [{"left": ALL, "operator": "equals", "right": ALL}] * 1_000}), TOO_MUCH),
    (chain_workflow(NUMBERS, make_node("bomb", "template", text=ALL * 20)), TOO_MUCH),
    (chain_workflow(NUMBERS, make_node("bomb", "map", items=[*range(50)], value=ALL)), "output-too-large"),
    (chain_workflow(NUMBERS, make_node("bomb", "sort", items=ALL)), "too-many-items"),
)


async def test_an_expression_bomb_ends_in_its_limit(shared_server: SharedServer) -> None:
    await shared_server.all_fail((graph, {}, expected) for graph, expected in BOMBS)


async def test_expressions_that_are_too_many_or_too_deep_are_refused(shared_server: SharedServer) -> None:
    assert "at most 1,000 operations" in await shared_server.refusal(
        computing_workflow([make_operation("lower", "A")] * 1_001)
    )
    assert "64 deep" in await shared_server.refusal(computing_workflow(DEEP))


async def test_a_body_of_millions_of_numbers_is_taken_in_without_a_pause(shared_server: SharedServer) -> None:
    await shared_server.completes(
        chain_workflow(make_node("note", "log", message="here")), {"numbers": [7] * 2_000_000}
    )


async def test_a_long_list_is_sorted_and_searched_without_a_pause(shared_server: SharedServer) -> None:
    items = make_operation("slice", ALL, 0, 100_000)
    found: Json = {"left": "{{ data.some }}", "operator": "contains", "right": "{{ item }}"}
    graph = chain_workflow(
        NUMBERS,
        make_node("some", "set", values={"some": items}, mode="replace"),
        make_node("sort", "sort", items="{{ data.some }}", by=["{{ item }}"] * 3),
        make_node(
            "less",
            "set",
            values={"some": make_operation("slice", "{{ nodes.sort.items }}", 0, 3)},
            mode="replace",
        ),
        make_node("filter", "filter", items="{{ data.some }}", condition=found),
    )
    assert (await shared_server.completes(graph))["filter"]["count"] == 3


# ── code, patterns and documents ────────────────────────────────────────────────────────────────────────────


CODE = (
    ("while True: pass", "timeout: "),
    ("while True: print('more')", "timeout: "),
    ("n = 10 ** 10 ** 6\npow(3, n, n + 1)", "timeout: "),  # days, in hardly any memory
    ("x = [0]\nwhile True: x = x + x", "out-of-memory: "),
    ("'x' * 10 ** 10", "out-of-memory: "),
    ("[1] * 5_000_000", "out-of-memory: "),
    ("def f(): return f()\nf()", "RecursionError"),
    ("import os\nos.fork()", "code-error: "),
    ("import socket", "code-error: "),
    ("open('/etc/passwd').read()", "code-error: "),
    ("__import__('os').system('id')", "code-error: "),
    ("().__class__.__bases__[0].__subclasses__()", "code-error: "),
    ("raise ValueError('x' * 100_000)", "code-error: ValueError: "),
    ("raise SystemExit", "code-error: SystemExit"),
    ("[float('nan')]", "not-finite: "),
    ("'\\0'", "nul-character: "),
    ("x = 0\nfor _ in range(99): x = [x]\nx", "too-deep: "),
)


async def test_code_ends_in_its_limits(shared_server: SharedServer) -> None:
    await shared_server.all_fail((code_workflow(source, expected), {}, expected) for source, expected in CODE)


LAUGHS = (
    '<!DOCTYPE l [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {chr(98 + depth)} "{f"&{chr(97 + depth)};" * 10}">' for depth in range(9))
    + "]><l>&j;</l>"
)
SECRET = '<!DOCTYPE l [<!ENTITY a SYSTEM "file:///etc/passwd">]><l>&a;</l>'


TEXT = "{{ data.body.text }}"
FIND_ALL = {"pattern": "a", "operation": "find-all"}
DOCUMENTS: Sequence[tuple[workflow_shapes.Node, str, str]] = (
    # Not the largest number of matches: a busy machine would reach the limit of five seconds first.
    (make_node("bomb", "regex", text=TEXT, maxMatches=1_000, **FIND_ALL), "a" * 110_000, "too-many-matches"),
    (make_node("bomb", "regex", text=TEXT, pattern="(?:a?){1000}a{1000}"), "a" * 900_000, "input-too-large"),
    (make_node("bomb", "regex", text=TEXT, pattern="\\pL{1000}"), "a", "invalid-pattern"),
    (make_node("bomb", "regex", text=TEXT, pattern="(.)" * 101), "a", "invalid-pattern"),
    (make_node("bomb", "xml-parse", text=TEXT), LAUGHS, "document-type-refused"),
    (make_node("bomb", "xml-parse", text=TEXT), SECRET, "document-type-refused"),
    (make_node("bomb", "xml-parse", text=TEXT), "<a>" * 500_000, "too-deep"),
    (make_node("bomb", "xml-parse", text=TEXT), f"<a>{'<b/>' * 300_001}</a>", "too-many-elements"),
    (
        make_node("bomb", "html-extract", html=TEXT, fields={"a": {"selector": "a"}}),
        "<div>" * 500_000,
        "too-deep",
    ),
    (make_node("bomb", "json-parse", text=TEXT), "[" * 1_000_001, "too-many-values"),
    (make_node("bomb", "json-parse", text=TEXT), "9" * 1_000_000, "invalid-json"),
    (make_node("bomb", "csv-parse", text=TEXT), ",".join(map(str, range(20_000))), "too-many-columns"),
    (make_node("bomb", "excel-parse", file=TEXT), "UEsDBA==", "invalid-workbook"),
)


async def test_a_pattern_or_document_ends_in_its_limit(shared_server: SharedServer) -> None:
    await shared_server.all_fail(
        (chain_workflow(bomb), {"text": text}, expected) for bomb, text, expected in DOCUMENTS
    )


async def test_a_pattern_that_others_never_come_to_the_end_of_takes_no_time(
    shared_server: SharedServer,
) -> None:
    for pattern in ("(a+)+$", "(a|a)*b", "(.*)*b"):
        await shared_server.completes(
            chain_workflow(make_node("find", "regex", text=TEXT, pattern=pattern)),
            {"text": "a" * 100_000 + "!"},
        )


# ── databases ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_sql_takes_values_as_values_names_as_names_and_one_statement(
    shared_server: SharedServer,
) -> None:
    whoami = (await shared_server.asked("GET", "/auth/whoami")).json()
    files = shared_server.folder / "files" / whoami["organizationId"]
    files.mkdir(parents=True)
    with sqlite3.connect(files / "shop.db") as database:
        database.execute("CREATE TABLE person (name TEXT)")
        database.execute("INSERT INTO person VALUES ('Ada')")
    database.close()
    made = await shared_server.asked(
        "POST", "/datasources", {"name": "Shop", "type": "sqlite", "settings": {"file": "shop.db"}}
    )
    assert made.status_code == HTTPStatus.CREATED, made.text
    source_id = made.json()["dataSourceId"]

    def reads(query: str, *parameters: Json, seconds: float = END_SECONDS) -> Workflow:
        config: dict[str, Json] = {"dataSource": source_id, "query": query, "parameters": [*parameters]}
        return chain_workflow(make_node("read", "sqlite-source", **config, timeoutSeconds=seconds))

    hostile = "' OR 1=1; DROP TABLE person; --"
    found = await shared_server.completes(reads("SELECT * FROM person WHERE name = ?", hostile))
    assert found["read"]["count"] == 0
    assert "statement-refused: " in await shared_server.failure(reads("SELECT 1; DROP TABLE person"))
    assert await shared_server.failure(reads("DELETE FROM person"))
    assert await shared_server.failure(reads("ATTACH DATABASE '/etc/passwd' AS a"))
    assert await shared_server.failure(reads("SELECT load_extension('/tmp/x.so')"))
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    assert await shared_server.failure(reads(endless, seconds=SHORT_SECONDS))
    assert await shared_server.failure(reads("SELECT hex(zeroblob(900000000))"))
    table = 'person"; DROP TABLE person; --'
    rows: Json = [{"name": "x"}]
    named = make_node("write", "sqlite-destination", dataSource=source_id, table=table, rows=rows)
    assert await shared_server.failure(chain_workflow(named))
    assert (await shared_server.completes(reads("SELECT * FROM person")))["read"]["count"] == 1


# ── upstreams ───────────────────────────────────────────────────────────────────────────────────────────────

HEAD = b"HTTP/1.1 200 OK\r\n"
ENDLESS: Mapping[str, tuple[bytes, bytes, float]] = {
    "/drip": (HEAD + b"Content-Length: 999999\r\n\r\n", b"x", 0.05),
    "/slow-head": (HEAD, b"X-One: 1\r\n", 0.05),
    "/headers": (HEAD, b"X-One: " + b"1" * 1_000 + b"\r\n", 0),
    "/line": (HEAD + b"X-One: ", b"1" * 1_000, 0),
    "/body": (HEAD + b"\r\n", b"x" * 65_536, 0),
    "/chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 10_000, 0),
}


@asynccontextmanager
async def serve_answers() -> AsyncIterator[str]:
    """Serve responses that exceed every limit."""
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
            await _answer(path, writer)
        writer.close()
        tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(path: str, writer: asyncio.StreamWriter) -> None:
    if path in ENDLESS:
        head, more, pause_seconds = ENDLESS[path]
        writer.write(head)
        while True:
            writer.write(more)
            await writer.drain()
            await asyncio.sleep(pause_seconds)
    elif path.startswith("/to/"):
        head = b"HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\n"
        writer.write(head + b"Location: %b\r\n\r\n" % path[4:].encode())
    elif path == "/gzip":
        bomb = gzip.compress(b"\0" * 50_000_000, compresslevel=1)
        head = b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
        writer.write(HEAD + head + bomb)
    else:
        body = b"[" + b"1," * 3_000_000 + b"1]"
        kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        writer.write(HEAD + kind + body)
    await writer.drain()


def fetching_workflow(url: str, timeout_seconds: float) -> Workflow:
    return chain_workflow(make_node("fetch", "http-request", url=url, timeoutSeconds=timeout_seconds))


UPSTREAMS = (
    ("/drip", "timed-out"),
    ("/slow-head", "timed-out"),
    ("/headers", "response-too-large"),
    ("/line", "invalid-response"),
    ("/body", "response-too-large"),
    ("/chunks", "invalid-response"),
    ("/gzip", "response-too-large"),
    ("/to//to/x", "too-many-redirects"),
    ("/to/http://127.0.0.2/", "address-not-allowed"),
    ("/to/http://169.254.169.254/latest/meta-data", "address-not-allowed"),
    ("/to/http://[::ffff:10.0.0.1]/", "address-not-allowed"),
    ("/to/http://2130706434/", "invalid-url"),
    ("/to/file:///etc/passwd", "invalid-url"),
)


async def test_an_upstream_ends_in_its_limit(shared_server: SharedServer) -> None:
    await shared_server.all_fail(
        (fetching_workflow(shared_server.upstream + path, limit_seconds(expected)), {}, expected)
        for path, expected in UPSTREAMS
    )


async def test_runs_that_hold_all_places_of_a_worker_leave_some_to_others(
    shared_server: SharedServer,
) -> None:
    places = int(SMALL["CONCURRENCY"])
    workflow_id = await shared_server.client.create(
        fetching_workflow(f"{shared_server.upstream}/drip", END_SECONDS)
    )
    executions = [await shared_server.client.execute(workflow_id) for _ in range(2 * places)]

    async def are_held() -> bool:
        path = f"/executions?workflow_id={workflow_id}&status=running&limit=100"
        return len((await shared_server.asked("GET", path)).json()["executions"]) >= places

    await wait_until(are_held, what="all places are held")
    async with asyncio.timeout(END_SECONDS / 2):
        for _ in range(2):
            await shared_server.neighbour.run()
    assert await are_held()
    await asyncio.gather(*(shared_server.client.ask(execution_id, "cancel") for execution_id in executions))
    for execution_id in executions:
        assert (await shared_server.client.end(execution_id, within=END_SECONDS)).status == "cancelled"


async def test_a_large_answer_is_read_without_a_pause(shared_server: SharedServer) -> None:
    await shared_server.completes(fetching_workflow(f"{shared_server.upstream}/json", END_SECONDS))


async def test_no_callback_is_sent_to_a_private_address(shared_server: SharedServer) -> None:
    workflow_id = await shared_server.client.create(chain_workflow(set_node("done")))
    for host in ("127.0.0.2", "[::1]", "10.0.0.1", "169.254.169.254", "[::ffff:192.168.0.1]"):
        response = await shared_server.asked(
            "POST", f"/workflows/{workflow_id}/execute", {"callbackUrl": f"http://{host}:8080/hook"}
        )
        assert response.status_code == HTTPStatus.UNPROCESSABLE_ENTITY, response.text


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────


DOUBLING: Json = {
    "$defs": {
        **{f"d{depth}": {"allOf": [{"$ref": f"#/$defs/d{depth + 1}"}] * 2} for depth in range(40)},
        "d40": {"type": "string"},
    },
    "$ref": "#/$defs/d0",
}
BRANCHING: Json = {
    "anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": "array", "items": {"$ref": "#"}}]
}
NESTED: Json = 1
for _ in range(40):
    NESTED = [NESTED]


FORMS: Sequence[tuple[Json, Json, str]] = (
    ({"$ref": "http://127.0.0.1:1/schema.json"}, {}, "invalid-schema"),
    ({"$ref": "file:///etc/passwd"}, {}, "invalid-schema"),
    (DOUBLING, 1, "invalid-schema"),
    (BRANCHING, NESTED, "invalid-schema"),
    ({"properties": {"a": {"pattern": "^(a+)+$"}}}, {"a": "a" * 50_000 + "!"}, "pattern"),
    ({"properties": {"a": {"pattern": "(?=(a+)+b)(\\w+)\\1{3,}x"}}}, {"a": "a" * 5_000}, "pattern"),
)


async def test_a_form_with_an_evil_schema_refuses_its_answer(shared_server: SharedServer) -> None:
    responses = await asyncio.gather(
        *(_answer_with(shared_server, schema, data) for schema, data, _ in FORMS)
    )
    for response, (_, _, expected) in zip(responses, FORMS, strict=True):
        assert response.status_code == HTTPStatus.UNPROCESSABLE_ENTITY, response.text
        assert expected in response.text


async def test_a_form_with_an_invalid_schema_is_refused(shared_server: SharedServer) -> None:
    refused = await shared_server.refusal(
        chain_workflow(make_node("ask", "human-input", title="Yes?", schema={"type": "nonsense"}))
    )
    assert "schema.type" in refused


async def test_a_form_that_refers_to_itself_takes_any_answer(shared_server: SharedServer) -> None:
    response = await _answer_with(shared_server, {"$ref": "#"}, {"any": "thing"})
    assert response.status_code == HTTPStatus.OK, response.text


async def _answer_with(shared_server: SharedServer, schema: Json, data: Json) -> httpx2.Response:
    graph = chain_workflow(make_node("ask", "human-input", title="Yes?", schema=schema))
    execution_id = await shared_server.client.execute(await shared_server.client.create(graph))
    await wait_until(partial(shared_server.client.has_status, execution_id, "waiting"))
    try:
        return await shared_server.asked(
            "POST", f"/executions/{execution_id}/input", {"nodeId": "ask", "data": data}
        )
    finally:
        await shared_server.client.ask(execution_id, "cancel")


# ── replaced contents ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_forged_blob_leads_nowhere(shared_server: SharedServer) -> None:
    forged: Json = {"$blob": {"sha256": "0" * 64, "size": 1, "type": "text/csv", "name": "../../etc/passwd"}}
    path: Json = {"$blob": {"sha256": "../../../../etc/passwd", "size": 1, "type": "text/csv", "name": "a"}}
    graph = chain_workflow(make_node("parse", "file-parse", blob="{{ data.body.blob }}", format="csv"))
    assert "blob-not-found" in await shared_server.failure(graph, {"blob": forged})
    assert "invalid-blob" in await shared_server.failure(graph, {"blob": path})


async def test_pinned_outputs_have_limits(shared_server: SharedServer) -> None:
    workflow_id = await shared_server.client.create(chain_workflow(set_node("one"), set_node("two")))
    execute = partial(shared_server.asked, "POST", f"/workflows/{workflow_id}/execute")
    unknown: list[Json] = [
        {"pinned": {"one": "x" * 1_000_001}},
        {"pinned": {"nothing": 1}},
        {"upTo": "nothing"},
        {"upTo": "x" * 1_000},
        {"pinned": {f"n{number}": 1 for number in range(20_000)}},
    ]
    for body in unknown:
        response = await execute(body)
        assert response.status_code == HTTPStatus.UNPROCESSABLE_ENTITY, response.text


# ── the others, and the end ─────────────────────────────────────────────────────────────────────────────────


async def test_nothing_of_one_organisation_is_there_for_another(shared_server: SharedServer) -> None:
    graph = chain_workflow(make_node("ask", "human-input", title="Yes?"))
    workflow_id = await shared_server.client.create(graph)
    execution_id = await shared_server.client.execute(workflow_id)
    await wait_until(partial(shared_server.client.has_status, execution_id, "waiting"))
    made = await shared_server.asked(
        "POST", "/datasources", {"name": "Theirs", "type": "webhook-secret", "secrets": {"secret": "x" * 40}}
    )
    source_id = made.json()["dataSourceId"]
    other = shared_server.neighbour.client
    asked: list[tuple[str, str, Json]] = [
        ("GET", f"/datasources/{source_id}", None),
        ("PUT", f"/datasources/{source_id}", {"name": "Mine"}),
        ("DELETE", f"/datasources/{source_id}", None),
        ("POST", f"/datasources/{source_id}/test", None),
        ("GET", f"/datasources/{source_id}/share", None),
        ("PUT", f"/datasources/{source_id}/visibility", {"isPublic": True}),
        ("GET", f"/executions/{execution_id}", None),
        ("GET", f"/executions/{execution_id}/spans", None),
        ("GET", f"/executions/{execution_id}/blobs/{'0' * 64}", None),
        ("GET", f"/executions/{execution_id}/pending-inputs", None),
        ("POST", f"/executions/{execution_id}/input", {"nodeId": "ask", "data": 1}),
        ("POST", f"/executions/{execution_id}/cancel", None),
        ("POST", f"/workflows/{workflow_id}/nodes/ask/test", {"input": 1}),
        ("POST", f"/workflows/{workflow_id}/execute", {"upTo": "ask"}),
    ]
    for method, path, body in asked:
        response = await other.send(method, path, body)
        assert response.status_code == HTTPStatus.NOT_FOUND, (method, path, response.text)
        assert execution_id not in response.text.replace(path, "")
    assert (await other.send("GET", f"/executions?parent_id={execution_id}")).json()["executions"] == []
    assert source_id not in (await other.send("GET", "/datasources?limit=100")).text
    calls = chain_workflow(make_node("call", "sub-workflow", workflowId=workflow_id))
    uses = chain_workflow(
        make_node("fetch", "http-request", url=shared_server.upstream, dataSource=source_id)
    )
    reaches = SharedServer(shared_server.deployment, other, shared_server.neighbour, shared_server.folder)
    for graph, code in ((calls, "workflow-not-found"), (uses, "data-source-not-found")):
        made = await other.send("POST", "/workflows", graph)
        if made.is_success:
            assert code in await reaches.failure(graph)
        else:
            assert made.status_code == HTTPStatus.UNPROCESSABLE_ENTITY
    await shared_server.client.ask(execution_id, "cancel")


@pytest.mark.timeout(2 * COLLECTION_SECONDS)
async def test_afterwards_everything_is_as_it_was(shared_server: SharedServer) -> None:
    assert shared_server.deployment.gateway.is_alive
    ready = await shared_server.asked("GET", "/../../readyz")
    assert ready.status_code == HTTPStatus.OK, ready.text

    async def is_memory_free() -> bool:
        if shared_server.process.memory_info().rss < SANE_BYTES:
            return True
        await shared_server.neighbour.run()  # its objects are counted until the next collection
        return False

    await wait_until(is_memory_free, COLLECTION_SECONDS, what="the memory is free again")

    def is_idle() -> bool:
        children = shared_server.process.children(recursive=True)
        return all(child.status() == psutil.STATUS_SLEEPING for child in children) and len(children) <= 12

    await wait_until(is_idle, what="no child is left at work")
