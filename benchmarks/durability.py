"""Power-loss experiment: record `pilotflame dev`, cut it off at many points, and restart it on the remaining
files.

The experiment records every file change while clients create workflows and run them. It picks points in
that record, above all those right after an answer. For each, it rebuilds the disk as a power cut may leave
it: without any unsynced data, or with any part of it. Everything acknowledged before that point must then
exist.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2

from journal.blobs.blob_reference import BlobReference
from tests import command_runs, power_loss, preloads
from tests.power_loss import SimulatedDisk, Survives

if TYPE_CHECKING:
    from tests.power_loss import FileOperation

KEY = "sk-of-the-power-cut-0123456789"
CLIENTS = 4
RUNS = 25
"""Of each client."""
TEXT_CHARACTERS = 3_000
ROW_BYTES = 1_024
"""Outputs that are longer become blobs."""
CHECKED_POINTS = 120
STARTED_POINTS = 6
PARTS_PER_POINT = 2
"""Disk states with a part of the unsynced data, in addition to the state with none of it."""
PATIENCE_SECONDS = 60.0
WORKFLOW = {
    "name": "Power",
    "nodes": [
        {"id": "start", "type": "manual"},
        {"id": "large", "type": "set", "config": {"values": {"text": "{{ data.body.text }}"}}},
        {
            "id": "file",
            "type": "file-destination",
            "config": {"key": "out/{{ execution.id }}.txt", "content": "{{ data.text }}"},
        },
    ],
    "connections": [{"source": "start", "target": "large"}, {"source": "large", "target": "file"}],
}


@dataclass(frozen=True, slots=True)
class AcknowledgedAnswer:
    """Acknowledgment that a client received, and the length of the record at that time."""

    at: int
    kind: str
    """`workflow`, `accepted` or `completed`."""
    id: str
    text: str = ""
    """Text that a completed run wrote into its file."""


@dataclass(slots=True)
class PowerLossLog:
    """Record of a server's file changes in one data folder, and of the answers that clients received meanwhile."""

    root: Path
    log: Path
    answers: list[AcknowledgedAnswer] = field(default_factory=list)

    @property
    def data(self) -> Path:
        """Data folder, which the server creates with its parent."""
        return self.root / "server" / "data"

    def note(self, kind: str, identity: str, text: str = "") -> None:
        self.answers.append(AcknowledgedAnswer(self.log.stat().st_size, kind, identity, text))


async def measure(folder: Path) -> dict[str, float]:
    """Return the numbers of checked disk states, of servers started on them,
    and of acknowledged answers that were lost.
    """
    library = preloads.compile_library(power_loss.RECORDER)
    if library is None:
        raise SystemExit("durability needs a C compiler: cc")
    recording = PowerLossLog(folder / "disk", folder / "operations")
    recording.root.mkdir()
    given = power_loss.recorder_environment(library, recording.root, recording.log)
    await _serve_until_done(
        recording.data, folder / "recorded.txt", given, lambda url: _drive_server(url, recording)
    )
    secret = (recording.data / "secret.key").read_bytes()
    operations = list(power_loss.read_operations(recording.log))
    checked = started = 0
    losses: list[str] = []
    answered = _spread_points([answer.at for answer in recording.answers], CHECKED_POINTS // 2)
    started_at = set(_spread_points(answered, STARTED_POINTS))
    for point, disk in _iterate_cut_points(recording, operations, answered):
        acknowledged = [answer for answer in recording.answers if answer.at <= point]
        for number in range(1 + PARTS_PER_POINT):
            survives = power_loss.keep_nothing if number == 0 else power_loss.keep_some(point + number)
            left = _materialize(disk, folder / "left", survives)
            data = left / recording.data.relative_to(recording.root)
            found = [*_find_lost(data, acknowledged, secret)]
            checked += 1
            if not found and point in started_at:
                found = await _find_lost_after_start(data, acknowledged, folder / "started.txt")
                started += 1
            losses += [f"at {point}, state {number}: {loss}" for loss in found]
    for loss in losses[:20]:
        print(f"  lost {loss}")
    return {
        "answers": len(recording.answers),
        "operations": len(operations),
        "states_checked": checked,
        "states_started": started,
        "answers_lost": len(losses),
    }


# ── the work ────────────────────────────────────────────────────────────────────────────────────────────────


async def _serve_until_done(
    data: Path, log: Path, given: dict[str, str], work: Callable[[str], Awaitable[None]]
) -> None:
    """Run a server on a data folder while `work`, called with its address, takes; then kill it."""
    settings = command_runs.command_environment(
        data, BOOTSTRAP_API_KEY=KEY, MAX_ROW_OUTPUT_BYTES=str(ROW_BYTES)
    )
    with command_runs.run_command(
        "dev", "--port", "0", given={**settings, **given}, log=log, anew=True
    ) as server:
        address = await asyncio.to_thread(lambda: server.says(r"Pilotflame runs on (\S+)")[1])
        await work(address)


def _open_client(url: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        base_url=f"{url}/api/v1", headers={"X-API-Key": KEY}, timeout=PATIENCE_SECONDS, trust_env=False
    )


async def _drive_server(url: str, recording: PowerLossLog) -> None:
    async with _open_client(url) as client:
        await asyncio.gather(*(_create_and_run(client, recording, number) for number in range(CLIENTS)))


async def _create_and_run(client: httpx2.AsyncClient, recording: PowerLossLog, number: int) -> None:
    """Create a workflow and run it repeatedly as one client; record each answer."""
    created = await client.post("/workflows", json={**WORKFLOW, "name": f"Power {number}"})
    workflow_id = created.raise_for_status().json()["workflowId"]
    recording.note("workflow", workflow_id)
    chance = random.Random(number)
    for _ in range(RUNS):
        text = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=TEXT_CHARACTERS))
        body = {"triggerInputs": {"text": text}}
        accepted = await client.post(f"/workflows/{workflow_id}/execute", json=body)
        execution_id = accepted.raise_for_status().json()["executionId"]
        recording.note("accepted", execution_id)
        ended = await client.get(f"/executions/{execution_id}/progress", params={"wait": 9})
        if ended.raise_for_status().json()["status"] == "completed":
            recording.note("completed", execution_id, text)


# ── the power cuts ──────────────────────────────────────────────────────────────────────────────────────────


def _iterate_cut_points(
    recording: PowerLossLog, operations: Sequence[FileOperation], answered: Sequence[int]
) -> Iterator[tuple[int, SimulatedDisk]]:
    """Yield points of the record in ascending order with the disk at each: right after answers, and some in between."""
    between = [operation.ends_at for operation in operations if operation.ends_at > min(answered)]
    points = sorted({*answered, *_spread_points(between, CHECKED_POINTS // 2)})
    disk, done = SimulatedDisk(recording.root), 0
    for point in points:
        while done < len(operations) and operations[done].ends_at <= point:
            disk.apply(operations[done])
            done += 1
        yield point, disk


def _spread_points(points: Sequence[int], count: int) -> list[int]:
    return [points[(len(points) - 1) * number // max(count - 1, 1)] for number in range(count)]


def _materialize(disk: SimulatedDisk, target: Path, survives: Survives) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    disk.write_out(target, survives)
    return target


def _find_lost(data: Path, acknowledged: Sequence[AcknowledgedAnswer], secret: bytes) -> Iterator[str]:
    """Yield a description of each acknowledged change that a data folder lacks."""
    database = data / "pilotflame.db"
    if not database.exists():
        yield "the database itself"
        return
    if not (data / "secret.key").exists() or (data / "secret.key").read_bytes() != secret:
        yield "the secret key"
    with closing(sqlite3.connect(database)) as connection:
        yield from _find_lost_rows(connection, data, acknowledged)


def _find_lost_rows(
    connection: sqlite3.Connection, data: Path, acknowledged: Sequence[AcknowledgedAnswer]
) -> Iterator[str]:
    """Yield a description of each acknowledged workflow, run and end that the database lacks."""
    try:
        (sound,) = connection.execute("PRAGMA integrity_check").fetchone()
        workflows = {row[0] for row in connection.execute("SELECT id FROM workflow")}
        statuses = dict(connection.execute("SELECT id, status FROM execution").fetchall())
    except sqlite3.DatabaseError as error:
        yield f"the database: {error}"
        return
    if sound != "ok":
        yield f"the database: {sound}"
    for answer in acknowledged:
        if answer.kind == "workflow" and answer.id not in workflows:
            yield f"workflow {answer.id}"
        if answer.kind == "accepted" and answer.id not in statuses:
            yield f"execution {answer.id}"
        if answer.kind == "completed":
            if statuses.get(answer.id) != "completed":
                yield f"the end of {answer.id}"
            yield from _find_lost_contents(connection, data, answer)


def _find_lost_contents(
    connection: sqlite3.Connection, data: Path, answer: AcknowledgedAnswer
) -> Iterator[str]:
    """Yield a description of the file, the spans and the blob of a completed run that are missing or damaged."""
    found = [*(data / "files").glob(f"*/objects/out/{answer.id}.txt")]
    if [path.read_text() for path in found] != [answer.text]:
        yield f"the file of {answer.id}"
    statement = "SELECT output_blob FROM span WHERE execution_id = ? AND output_blob IS NOT NULL"
    blobs = connection.execute(statement, (answer.id,)).fetchall()
    if not blobs:
        yield f"the spans of {answer.id}"
    for (text,) in blobs:
        reference = BlobReference.from_text(text.encode())
        kept = [*(data / "blobs").glob(f"*/{answer.id}/{reference.sha256}")]
        if not any(_is_intact(path) for path in kept):
            yield f"a blob of {answer.id}"


def _is_intact(path: Path) -> bool:
    _, _, content = path.read_bytes().partition(b"\n")
    return sha256(content).hexdigest() == path.name


async def _find_lost_after_start(
    data: Path, acknowledged: Sequence[AcknowledgedAnswer], log: Path
) -> list[str]:
    """Start a server on the remaining files; return the acknowledged workflows
    and runs that it lost or doesn't complete.
    """
    lost: list[str] = []

    async def ask(url: str) -> None:
        async with _open_client(url) as client:
            for answer in acknowledged:
                if answer.kind == "workflow":
                    response = await client.get(f"/workflows/{answer.id}")
                    if not response.is_success:
                        lost.append(f"workflow {answer.id} after a start")
                elif not await _runs_to_completion(client, answer):
                    lost.append(f"execution {answer.id} after a start")

    await _serve_until_done(data, log, {}, ask)
    return lost


async def _runs_to_completion(client: httpx2.AsyncClient, answer: AcknowledgedAnswer) -> bool:
    progress: dict[str, Any] = {"status": "pending"}
    async with asyncio.timeout(PATIENCE_SECONDS):
        while progress["status"] in {"pending", "running", "waiting"}:
            response = await client.get(f"/executions/{answer.id}/progress", params={"wait": 9})
            if not response.is_success:
                return False
            progress = response.json()
    if progress["status"] != "completed":
        return False
    return not answer.text or await _gives_content(client, answer, progress["outputs"])


async def _gives_content(client: httpx2.AsyncClient, answer: AcknowledgedAnswer, outputs: object) -> bool:
    """Return whether the API still serves the large output of a run, given the run's outputs."""
    hashes = set(re.findall(r'"sha256": ?"([0-9a-f]{64})"', json.dumps(outputs)))
    contents = [await client.get(f"/executions/{answer.id}/blobs/{one}") for one in sorted(hashes)]
    return any(content.is_success and answer.text in content.text for content in contents)
