"""Store of tasks: claims, reports, stops and sweeps, each one transaction for many workers on either database."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy import bindparam, text

from engine.node_api import parse_version
from journal.concurrency_limits import advisory_lock_id
from journal.tasks import task_moves
from journal.tasks.task_moves import FIRST_LEASE_MICROSECONDS, ReportStatus
from journal.tasks.task_transaction import LogText, TaskEffects, TaskTransaction
from models.task_states import HELD_CONDITION, TaskState
from models.timestamps import HOST_TIME

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from journal.tasks.task_moves import TaskRow
    from models.database import Database

MAX_QUEUES: Final = 1_000
MAX_CLAIM: Final = 100
CHOSEN_TOGETHER: Final = 400
"""Tasks that one statement leases to all polls."""
MAX_CLAIM_BYTES: Final = 4_194_304
ADMITTED_TOGETHER: Final = 500
FORGOTTEN_MICROSECONDS: Final = 7 * 86_400_000_000
_NOW: Final = {
    "postgresql": "CAST(extract(epoch FROM now()) * 1000000 AS bigint)",
    "sqlite": ":now",
}
_CLAIMED: Final = (
    *("id", "lease", "lease_microseconds", "deadline_at", "type", "version", "execution_id", "node_id"),
    *("key", "config", "input", "input_bytes", "checkpoint", "failures", "losses", "is_acknowledged"),
    *("worker_id", "claim_id", "state", "organization_id", "queue_turn", "claimed_at"),
)


class ClaimedTask(msgspec.Struct):
    """Task that a worker holds."""

    id: str
    lease: str
    lease_microseconds: int
    deadline_at: int
    type: str
    version: str
    execution_id: str
    node_id: str
    key: str
    config: str
    input: str | None
    input_bytes: int
    checkpoint: str | None
    failures: int
    losses: int
    is_acknowledged: bool
    worker_id: str
    claim_id: str
    state: str
    organization_id: str
    queue_turn: int
    claimed_at: int

    @property
    def attempt(self) -> int:
        return self.failures + self.losses + 1

    @property
    def size(self) -> int:
        """Approximate number of characters that the task takes in the answer to a claim."""
        return 1_000 + len(self.config) + len(self.input or "") + len(self.checkpoint or "")


class TaskPoll(msgspec.Struct, frozen=True):
    """Poll of a worker for tasks."""

    organization_id: str
    worker_id: str
    request_id: str
    limit: int
    versions: Mapping[str, str]
    """Version of each type that the worker performs."""
    pools: frozenset[str]

    @property
    def served(self) -> tuple[object, ...]:
        """Organization, types with versions, and pools of the worker: polls with equal ones get the same tasks."""
        return self.organization_id, tuple(sorted(self.versions.items())), self.pools

    def serves(self, queue: str) -> bool:
        """Return whether the worker performs the tasks of a queue, `<type>@<version>#<pool>`: its major
        version, and none newer.
        """
        name, _, rest = queue.partition("@")
        version, _, pool = rest.partition("#")
        own = self.versions.get(name)
        if own is None or pool not in self.pools:
            return False
        return is_served(version, own)


def is_served(wanted: str, own: str) -> bool:
    """Return whether a worker of version `own` performs tasks of version `wanted`: the same major version,
    and not newer.
    """
    asked, offered = parse_version(wanted), parse_version(own)
    return asked[:1] == offered[:1] and asked <= offered


class PollFindings(msgspec.Struct):
    """Tasks for a poll without a claim: those of the same request before, and cancellations."""

    repeated: list[ClaimedTask]
    cancelling: list[str]
    has_work: bool
    is_draining: bool = False
    is_stopped: bool = False


class OrganizationNews(msgspec.Struct):
    """Work and requests for the workers of an organization."""

    queues: list[str]
    cancelling: list[tuple[str, str]]
    """Worker and task of each requested cancellation."""
    leaving: dict[str, bool]
    """Workers that stop (true), or that an operator has asked to stop (false)."""


class ItemKind(msgspec.Struct, frozen=True):
    """Base of the items of a report."""

    id: str
    lease: str


class Heartbeat(ItemKind, frozen=True):
    """Sign of life with the progress and the checkpoint of a task."""

    progress: str | None = None
    checkpoint: str | None = None


class Completion(ItemKind, frozen=True):
    """Output of a task."""

    port: str = "output"
    output: bytes = b"null"
    is_uploaded: bool = False
    """Whether the output was uploaded before."""


class Failure(ItemKind, frozen=True):
    """Failed attempt of a task."""

    code: str = "task-failed"
    message: str = ""
    is_final: bool = False
    delay: int | None = None
    """Microseconds until the next attempt; None for the delay of the node type."""
    is_refusal: bool = False
    """Whether the server refuses the output that the worker has reported."""


class Release(ItemKind, frozen=True):
    """Task that its worker gives back unbegun."""


class LogLines(ItemKind, frozen=True):
    """Lines for the log of the run."""

    lines: Sequence[LogText] = ()


class WorkerReport(msgspec.Struct, frozen=True):
    """Report of a worker about the tasks that it holds."""

    organization_id: str
    worker_id: str
    claimed: str | None
    """Last claim whose answer the worker has received."""
    held: Sequence[str]
    items: Sequence[ItemKind]


class ItemResult(msgspec.Struct, frozen=True):
    """Result of one item of a report."""

    id: str
    status: ReportStatus
    code: str | None = None
    message: str | None = None


class TaskFacts(msgspec.Struct, frozen=True):
    """Facts about a task that never change."""

    id: str
    organization_id: str
    execution_id: str
    type: str
    version: str


OutputCheck = Callable[[TaskFacts, Completion], "tuple[str, str] | None"]
"""Returns code and message of the problem of an output; None if it is valid."""


class TaskStore:
    """Tasks in the database of a process."""

    def __init__(self, database: Database, *, max_log_lines: int = 10_000) -> None:
        self._database = database
        self._max_log_lines = max_log_lines
        self._turns: dict[str, int] = {}

    # ── claims ──────────────────────────────────────────────────────────────────────────────────────────────

    async def look(self, polls: Sequence[TaskPoll]) -> list[PollFindings]:
        """Return for each poll the tasks that an equal earlier request got, tasks to cancel, and whether
        tasks wait; claims nothing.

        It also says whether the worker has stopped or is asked to.
        """
        async with self._database.read() as connection:
            held = await _read_held(connection, polls)
            leaving = await _read_leaving(connection, polls)
            queues = {
                organization_id: await _ready_queues(connection, organization_id)
                for organization_id in {poll.organization_id for poll in polls if poll.limit > 0}
            }
        found: list[PollFindings] = []
        for poll in polls:
            own = [
                task
                for task in held
                if task.organization_id == poll.organization_id and task.worker_id == poll.worker_id
            ]
            is_leaving = leaving.get((poll.organization_id, poll.worker_id))
            found.append(
                PollFindings(
                    repeated=[
                        task
                        for task in own
                        if task.claim_id == poll.request_id and task.state == TaskState.LEASED
                    ],
                    cancelling=[task.id for task in own if task.state == TaskState.CANCEL_REQUESTED],
                    has_work=poll.limit > 0 and any(map(poll.serves, queues.get(poll.organization_id, ()))),
                    is_draining=is_leaving is False,
                    is_stopped=is_leaving is True,
                )
            )
        return found

    async def claim(self, polls: Sequence[TaskPoll]) -> list[list[ClaimedTask]]:
        """Lease ready tasks to workers, at most `limit` to each; return the tasks of each poll.

        Workflows are served in turn. Workers that stop or are asked to get none. An answer has at most 4 MiB,
        but at least one task.
        """

        async def work(connection: AsyncConnection) -> list[list[ClaimedTask]]:
            leaving = await _read_leaving(connection, polls)
            queues = {
                organization_id: await _ready_queues(connection, organization_id)
                for organization_id in {poll.organization_id for poll in polls}
            }
            alike: dict[tuple[object, ...], list[int]] = {}
            for number, poll in enumerate(polls):
                if poll.limit > 0 and (poll.organization_id, poll.worker_id) not in leaving:
                    alike.setdefault(poll.served, []).append(number)
            claimed: list[list[ClaimedTask]] = [[] for _ in polls]
            for numbers in alike.values():
                group = [polls[number] for number in numbers]
                found = await self._claim_for(connection, group, queues[group[0].organization_id])
                for number, tasks in zip(numbers, found, strict=True):
                    claimed[number] = tasks
            return claimed

        return await self._database.transaction(work)

    async def _claim_for(
        self, connection: AsyncConnection, polls: Sequence[TaskPoll], queues: Sequence[str]
    ) -> list[list[ClaimedTask]]:
        """Claim for polls of workers with the same types and pools, each up to its limit, in their order;
        return the tasks of each.

        Tasks that exceed the bytes of an answer are freed again.
        """
        claimed: list[list[ClaimedTask]] = [[] for _ in polls]
        places = [number for number, poll in enumerate(polls) for _ in range(min(poll.limit, MAX_CLAIM))]
        organization_id = polls[0].organization_id
        for queue in filter(polls[0].serves, queues):
            if not places:
                break
            key = f"{organization_id} {queue}"
            turn = self._turns.get(key, 0)
            chosen = await _choose(
                connection, organization_id, queue, turn, min(len(places), CHOSEN_TOGETHER)
            )
            given = [(task_id, polls[number]) for task_id, number in zip(chosen, places, strict=False)]
            taken = await _take(connection, given) if given else []
            if taken:
                self._turns[key] = taken[-1].queue_turn + 1
            numbers = dict(zip(chosen, places, strict=False))
            for task in taken:
                claimed[numbers[task.id]].append(task)
            places = places[len(chosen) :]
        spilled: list[ClaimedTask] = []
        for number, tasks in enumerate(claimed):
            claimed[number], rest = _within_bytes(tasks, MAX_CLAIM_BYTES)
            spilled += rest
        if spilled:
            await _put_back(connection, [task.id for task in spilled])
        return claimed

    # ── reports ─────────────────────────────────────────────────────────────────────────────────────────────

    async def facts(self, organization_id: str, task_ids: Sequence[str]) -> dict[str, TaskFacts]:
        """Return facts that never change about tasks of an organization, by id; unknown tasks are left out."""
        async with self._database.read() as connection:
            found = await _read_facts(connection, task_ids)
        return {one.id: one for one in found if one.organization_id == organization_id}

    async def report(
        self, batch: Sequence[WorkerReport], check: OutputCheck
    ) -> tuple[list[list[ItemResult]], TaskEffects]:
        """Apply reports of workers in one transaction; return the results of their items, in order, and the
        effects to announce.

        `check` returns the error of an invalid output, which fails the attempt. Ids among `held` that the
        worker has lost are added to its results.
        """
        item_ids = sorted({item.id for report in batch for item in report.items})
        facts: dict[str, TaskFacts] = {}
        if item_ids:
            async with self._database.read() as connection:
                facts = {one.id: one for one in await _read_facts(connection, item_ids)}
        problems = {
            id(item): problem
            for report in batch
            for item in report.items
            if isinstance(item, Completion)
            and item.id in facts
            and (problem := check(facts[item.id], item)) is not None
        }

        async def work(connection: AsyncConnection) -> tuple[list[list[ItemResult]], TaskEffects]:
            transaction = TaskTransaction(connection)
            reported = [facts[one] for one in item_ids if one in facts]
            final = {
                item.id
                for report in batch
                for item in report.items
                if isinstance(item, Completion | Failure | LogLines)
            }
            await transaction.lock_runs(sorted({one.execution_id for one in reported if one.id in final}))
            held_ids = sorted({*item_ids, *(one for report in batch for one in report.held)})
            if held_ids:
                await transaction.lock_tasks("id IN :task_ids", task_ids=held_ids)
            claiming = [report for report in batch if report.claimed is not None]
            if claiming:
                await transaction.lock_tasks(
                    "organization_id IN :organizations AND worker_id IN :workers"
                    f" AND {HELD_CONDITION} AND NOT is_acknowledged",
                    organizations=sorted({report.organization_id for report in claiming}),
                    workers=sorted({report.worker_id for report in claiming}),
                )
            results = [self._apply(transaction, report, problems) for report in batch]
            return results, await transaction.store()

        return await self._database.transaction(work)

    def _apply(
        self,
        transaction: TaskTransaction,
        report: WorkerReport,
        problems: Mapping[int, tuple[str, str]],
    ) -> list[ItemResult]:
        """Apply one report to the locked tasks; return the results of its items and the tasks that its worker
        has lost.
        """
        results = [
            self._apply_item(transaction, report, item, problems.get(id(item))) for item in report.items
        ]
        named = {item.id for item in report.items}
        for task_id in report.held:
            task = _task_of(transaction, report, task_id)
            if task is not None and task.is_held and task.worker_id == report.worker_id:
                task_moves.renew(task, transaction.now)
                if task.state == TaskState.CANCEL_REQUESTED and task_id not in named:
                    results.append(ItemResult(task_id, ReportStatus.CANCELLED))
            elif task_id not in named:
                is_cancelled = task is not None and task.state == TaskState.CANCELLED
                status = ReportStatus.CANCELLED if is_cancelled else ReportStatus.LOST
                results.append(ItemResult(task_id, status))
        if report.claimed is not None:
            _return_unreceived(transaction, report, named)
        return results

    def _apply_item(
        self,
        transaction: TaskTransaction,
        report: WorkerReport,
        item: ItemKind,
        problem: tuple[str, str] | None,
    ) -> ItemResult:
        """Apply one item of a report to its task, and return its result; `LOST` for an unknown task."""
        task = _task_of(transaction, report, item.id)
        if task is None:
            return ItemResult(item.id, ReportStatus.LOST)
        run = transaction.run_of(task)
        if run is not None and run.is_ended and task.state == TaskState.LEASED:
            task_moves.cancel(task, transaction.now)
        match item:
            case Completion():
                return _complete(transaction, task, item, problem)
            case Failure():
                return _fail(transaction, task, item)
            case Release():
                return ItemResult(item.id, task_moves.release(task, item.lease, transaction.now))
            case LogLines():
                if not task_moves.is_holder(task, item.lease):
                    return ItemResult(item.id, ReportStatus.LOST)
                transaction.add_lines(task, item.lines, self._max_log_lines)
                return ItemResult(item.id, ReportStatus.OK)
            case Heartbeat():
                return _beat(task, item, transaction.now)
        raise TypeError(item)

    async def upload(self, organization_id: str, task_id: str, lease: str, output: bytes) -> bool:
        """Keep a large output with a task until the report that completes it; return False if the worker has
        lost the lease.
        """
        statement = text(
            f"UPDATE task SET output = :output, output_lease = :lease WHERE id = :task_id"
            f" AND organization_id = :organization_id AND lease = :lease AND {HELD_CONDITION}"
        )
        values = {
            "output": output.decode(),
            "lease": lease,
            "task_id": task_id,
            "organization_id": organization_id,
        }

        async def work(connection: AsyncConnection) -> bool:
            return (await connection.execute(statement, values)).rowcount == 1

        return await self._database.transaction(work)

    # ── cancellation and time ───────────────────────────────────────────────────────────────────────────────

    async def sweep(self, limit: int = 200) -> TaskEffects:
        """Move up to `limit` tasks whose time has come: ended leases, deadlines, delays and start timeouts.

        Locked ones are left to the next call. Return the effects to announce. Nodes of failed tasks get the
        error.
        """
        async with self._database.read() as connection:
            now = _NOW[connection.dialect.name]
            found = await connection.execute(
                text(
                    f"SELECT id, execution_id FROM task WHERE check_at <= {now} ORDER BY check_at LIMIT :limit"
                ),
                {"limit": limit, **_host_time(connection)},
            )
            due = found.all()
        if not due:
            return TaskEffects()

        async def work(connection: AsyncConnection) -> TaskEffects:
            transaction = TaskTransaction(connection)
            await transaction.lock_runs(sorted({row.execution_id for row in due}))
            await transaction.lock_tasks(
                "id IN :task_ids", skips_locked=True, task_ids=sorted(row.id for row in due)
            )
            for task in transaction.tasks.values():
                task_moves.check(task, transaction.now)
                if task.state == TaskState.FAILED and task.ended_at == transaction.now:
                    transaction.answer_failure(task)
            return await transaction.store()

        return await self._database.transaction(work)

    async def cancel_abandoned(self, limit: int = 200) -> TaskEffects:
        """Cancel up to `limit` open tasks whose runs have ended or are gone; return the effects to announce."""
        statement = text(
            "SELECT id FROM task WHERE ended_at IS NULL AND state <> 'cancel_requested' AND NOT EXISTS"
            " (SELECT 1 FROM execution WHERE execution.id = task.execution_id AND execution.ended_at IS NULL)"
            " LIMIT :limit"
        )
        async with self._database.read() as connection:
            task_ids = sorted((await connection.scalars(statement, {"limit": limit})).all())
        return await self._cancel(task_ids) if task_ids else TaskEffects()

    async def _cancel(self, task_ids: Sequence[str]) -> TaskEffects:
        """Cancel tasks by id in one transaction; return the effects to announce."""

        async def work(connection: AsyncConnection) -> TaskEffects:
            transaction = TaskTransaction(connection)
            await transaction.lock_tasks("id IN :task_ids", task_ids=list(task_ids))
            for task in transaction.tasks.values():
                task_moves.cancel(task, transaction.now)
            return await transaction.store()

        return await self._database.transaction(work)

    async def forget_workers(self) -> None:
        """Delete workers that have not polled for a week: each start of a process has a row of its own."""

        async def work(connection: AsyncConnection) -> None:
            now = _NOW[connection.dialect.name]
            statement = text(f"DELETE FROM task_worker WHERE last_seen_at < {now} - {FORGOTTEN_MICROSECONDS}")
            await connection.execute(statement, _host_time(connection))

        await self._database.transaction(work)

    async def put_back(self, task_ids: Sequence[str]) -> None:
        """Free tasks that were just claimed, since the answer reaches no worker; that costs no attempt."""

        async def work(connection: AsyncConnection) -> None:
            await _put_back(connection, task_ids)

        await self._database.transaction(work)

    async def news(self, organization_id: str, polls: Sequence[TaskPoll]) -> OrganizationNews:
        """Return the queues of an organization with tasks to claim, up to 1,000 tasks to cancel, and which
        polling workers leave.
        """
        cancelling = text(
            "SELECT worker_id, id FROM task WHERE state = 'cancel_requested'"
            " AND organization_id = :organization_id LIMIT 1000"
        )
        values = {"organization_id": organization_id}
        async with self._database.read() as connection:
            return OrganizationNews(
                await _ready_queues(connection, organization_id),
                [(row[0], row[1]) for row in await connection.execute(cancelling, values)],
                {key[1]: stops for key, stops in (await _read_leaving(connection, polls)).items()},
            )

    async def changed_organizations(self, organization_ids: Sequence[str]) -> set[str]:
        """Return those organizations that have tasks to claim, or tasks that workers shall stop."""
        found: set[str] = set()
        async with self._database.read() as connection:
            for start in range(0, len(organization_ids), 100):
                part = organization_ids[start : start + 100]
                parts = [
                    f"SELECT * FROM (SELECT organization_id FROM task WHERE {condition}"
                    f" AND organization_id = :o{number} LIMIT 1) AS {letter}{number}"
                    for number in range(len(part))
                    for letter, condition in (("r", "state = 'ready'"), ("c", "state = 'cancel_requested'"))
                ]
                values = {f"o{number}": one for number, one in enumerate(part)}
                found |= set(await connection.scalars(text(" UNION ALL ".join(parts)), values))
        return found

    async def stop_worker(self, organization_id: str, worker_id: str) -> bool:
        """Store that a task worker has stopped, so that it gets no more tasks; return False for an unknown one."""
        return await self._mark_worker(organization_id, worker_id, "stopped_at = coalesce(stopped_at, {now})")

    async def drain_worker(self, organization_id: str, worker_id: str) -> bool:
        """Store that a task worker is asked to stop, which its next poll tells it; return False for an unknown one."""
        return await self._mark_worker(organization_id, worker_id, "is_draining = :yes")

    async def _mark_worker(self, organization_id: str, worker_id: str, change: str) -> bool:
        """Assign columns of a worker's row by SQL; return False for an unknown worker."""

        async def work(connection: AsyncConnection) -> bool:
            assignment = change.format(now=_NOW[connection.dialect.name])
            values: dict[str, Any] = {"organization_id": organization_id, "worker_id": worker_id}
            if ":yes" in assignment:
                values["yes"] = True
            if ":now" in assignment:
                values |= _host_time(connection)
            statement = text(
                f"UPDATE task_worker SET {assignment} WHERE organization_id = :organization_id AND id = :worker_id"
            )
            return (await connection.execute(statement, values)).rowcount == 1

        return await self._database.transaction(work)

    # ── concurrency ─────────────────────────────────────────────────────────────────────────────────────────

    async def admit(self, keys: Sequence[str]) -> set[str]:
        """Let waiting tasks of concurrency keys be claimed, as far as places are free, each key in a transaction.

        Return the organizations of keys that had tasks admitted.
        """
        ready: set[str] = set()
        for key in keys:
            ready |= await self._database.transaction(partial(_admit, key=key))
        return ready

    async def limited_keys(self, organization_id: str = "") -> list[str]:
        """Return up to 200 concurrency keys with waiting tasks, in order, of one organization or (empty) of all."""
        first = f"{organization_id} " if organization_id else ""
        last = f"{organization_id}!" if organization_id else "~"
        statement = text(
            "WITH RECURSIVE found (key, place) AS ("
            " SELECT (SELECT min(concurrency_key) FROM task WHERE state = 'limited'"
            " AND concurrency_key > :first AND concurrency_key < :last), 1"
            " UNION ALL SELECT (SELECT min(concurrency_key) FROM task WHERE state = 'limited'"
            " AND concurrency_key > found.key AND concurrency_key < :last), place + 1"
            " FROM found WHERE found.key IS NOT NULL AND place < 200)"
            " SELECT key FROM found WHERE key IS NOT NULL"
        )
        async with self._database.read() as connection:
            return list(await connection.scalars(statement, {"first": first, "last": last}))


def _task_of(transaction: TaskTransaction, report: WorkerReport, task_id: str) -> TaskRow | None:
    """Return a locked task of the organization of a report; None for any other."""
    task = transaction.tasks.get(task_id)
    return task if task is not None and task.organization_id == report.organization_id else None


def _complete(
    transaction: TaskTransaction,
    task: TaskRow,
    item: Completion,
    problem: tuple[str, str] | None,
) -> ItemResult:
    """Complete a task with its output, or count a failed attempt for an output with a problem; return the
    item's result.
    """
    output, now = item.output, transaction.now
    if item.is_uploaded and task_moves.is_holder(task, item.lease):
        if task.output is None or task.output_lease != item.lease:
            message = "Send the output with PUT /tasks/{id}/output first, under the same lease"
            return ItemResult(item.id, ReportStatus.REFUSED, "output-missing", message)
        output = task.output.encode()
    if problem is not None:
        code, message = problem
        status = task_moves.fail(task, item.lease, now, code, message, is_final=True)
        if status is ReportStatus.OK:
            transaction.answer_failure(task)
        if status in {ReportStatus.OK, ReportStatus.REPEATED}:
            return ItemResult(item.id, ReportStatus.REFUSED, code, message)
        return ItemResult(item.id, status)
    status = task_moves.complete(task, item.lease, now)
    if status is ReportStatus.OK:
        port = msgspec.json.encode(item.port)
        transaction.answer(task, b'{"output":%b,"port":%b}' % (output, port))
    return ItemResult(item.id, status)


def _fail(transaction: TaskTransaction, task: TaskRow, item: Failure) -> ItemResult:
    """Count the failed attempt that an item reports; return the item's result, `REFUSED` if the server
    refused the output.
    """
    status = task_moves.fail(
        task,
        item.lease,
        transaction.now,
        item.code,
        item.message,
        is_final=item.is_final,
        delay=item.delay,
    )
    if status is ReportStatus.OK and task.state == TaskState.FAILED:
        transaction.answer_failure(task)
    if item.is_refusal and status in {ReportStatus.OK, ReportStatus.REPEATED}:
        return ItemResult(item.id, ReportStatus.REFUSED, item.code, item.message)
    return ItemResult(item.id, status)


def _beat(task: TaskRow, item: Heartbeat, now: int) -> ItemResult:
    """Renew the lease of a task, and store its progress and checkpoint; the result may ask the worker to stop."""
    if not task_moves.is_holder(task, item.lease):
        is_cancelled = task.lease == item.lease and task.state == TaskState.CANCELLED
        return ItemResult(item.id, ReportStatus.CANCELLED if is_cancelled else ReportStatus.LOST)
    task_moves.renew(task, now)
    if item.progress is not None:
        task.progress = item.progress
    if item.checkpoint is not None:
        task.checkpoint = item.checkpoint
    is_cancelled = task.state == TaskState.CANCEL_REQUESTED
    return ItemResult(item.id, ReportStatus.CANCELLED if is_cancelled else ReportStatus.OK)


def _return_unreceived(transaction: TaskTransaction, report: WorkerReport, named: set[str]) -> None:
    """Free tasks of this and earlier claims that the worker does not name as held: the answers to these
    claims were lost.
    """
    own = [
        task
        for task in transaction.tasks.values()
        if task.worker_id == report.worker_id
        and task.organization_id == report.organization_id
        and task.is_held
    ]
    times = [task.claimed_at or 0 for task in own if task.claim_id == report.claimed]
    if not times:
        return
    held = {*report.held, *named}
    for task in own:
        if not task.is_acknowledged and task.id not in held and (task.claimed_at or 0) <= max(times):
            task_moves.return_unreceived(task, transaction.now)


def _host_time(connection: AsyncConnection) -> dict[str, int]:
    """Return the time of the host as the parameter of SQLite's statements; empty for PostgreSQL, which has
    its own time.
    """
    return {} if connection.dialect.name == "postgresql" else {"now": HOST_TIME.microseconds()}


async def _read_held(connection: AsyncConnection, polls: Sequence[TaskPoll]) -> list[ClaimedTask]:
    statement = text(
        f"SELECT {', '.join(_CLAIMED)} FROM task WHERE organization_id IN :organizations"
        f" AND worker_id IN :workers AND {HELD_CONDITION} ORDER BY id"
    ).bindparams(bindparam("organizations", expanding=True), bindparam("workers", expanding=True))
    values = {
        "organizations": sorted({poll.organization_id for poll in polls}),
        "workers": sorted({poll.worker_id for poll in polls}),
    }
    return [ClaimedTask(*row) for row in await connection.execute(statement, values)]


async def _read_leaving(
    connection: AsyncConnection, polls: Sequence[TaskPoll]
) -> dict[tuple[str, str], bool]:
    """Return the polling workers that have stopped (True) or are asked to stop (False), by organization and id."""
    statement = text(
        "SELECT organization_id, id, stopped_at FROM task_worker WHERE organization_id IN :organizations"
        " AND id IN :workers AND (is_draining OR stopped_at IS NOT NULL)"
    ).bindparams(bindparam("organizations", expanding=True), bindparam("workers", expanding=True))
    values = {
        "organizations": sorted({poll.organization_id for poll in polls}),
        "workers": sorted({poll.worker_id for poll in polls}),
    }
    rows = await connection.execute(statement, values)
    return {(row[0], row[1]): row[2] is not None for row in rows}


async def _read_facts(connection: AsyncConnection, task_ids: Sequence[str]) -> list[TaskFacts]:
    statement = text(
        "SELECT id, organization_id, execution_id, type, version FROM task WHERE id IN :task_ids"
    ).bindparams(bindparam("task_ids", expanding=True))
    return [TaskFacts(*row) for row in await connection.execute(statement, {"task_ids": list(task_ids)})]


async def _ready_queues(connection: AsyncConnection, organization_id: str) -> list[str]:
    """Return up to 1,000 queues of an organization with tasks to claim, in order, with one index probe each."""
    statement = text(
        "WITH RECURSIVE found (queue, place) AS ("
        " SELECT (SELECT min(queue) FROM task WHERE state = 'ready' AND organization_id = :organization_id), 1"
        " UNION ALL SELECT (SELECT min(queue) FROM task WHERE state = 'ready'"
        " AND organization_id = :organization_id AND queue > found.queue), place + 1"
        f" FROM found WHERE found.queue IS NOT NULL AND place < {MAX_QUEUES})"
        " SELECT queue FROM found WHERE queue IS NOT NULL"
    )
    return list(await connection.scalars(statement, {"organization_id": organization_id}))


_OF_QUEUE: Final = "state = 'ready' AND organization_id = :organization_id AND queue = :queue"


async def _choose(
    connection: AsyncConnection, organization_id: str, queue: str, after: int, limit: int
) -> list[str]:
    """Return the ids of up to `limit` next tasks of a queue: its workflows in turn, from the turn `after` on.

    Of one workflow, tasks with earlier attempts come before fresh ones.
    """
    values: dict[str, Any] = {"organization_id": organization_id, "queue": queue}
    statement = text(
        "WITH RECURSIVE turn (turn, place) AS ("
        f" SELECT (SELECT min(queue_turn) FROM task WHERE {_OF_QUEUE} AND queue_turn >= :after), 1"
        f" UNION ALL SELECT (SELECT min(queue_turn) FROM task WHERE {_OF_QUEUE}"
        " AND queue_turn > turn.turn), place + 1"
        " FROM turn WHERE turn.turn IS NOT NULL AND place < :turns)"
        " SELECT turn FROM turn WHERE turn IS NOT NULL"
    )
    turns: list[int] = []
    for first in (after, 0) if after else (0,):
        found = await connection.scalars(statement, {**values, "after": first, "turns": limit})
        turns += [turn for turn in found if turn not in turns]
        if len(turns) >= limit:
            break
    turns = turns[:limit]
    if not turns:
        return []
    # More than an equal share of each: other workflows may have fewer tasks than theirs.
    share = limit if len(turns) == 1 else min(limit, 4 * -(-limit // len(turns)))
    parts = [
        f"SELECT * FROM (SELECT id, queue_turn FROM task WHERE {_OF_QUEUE} AND queue_turn = :t{number}"
        f" ORDER BY is_fresh, rank, id LIMIT :share) AS p{number}"
        for number in range(len(turns))
    ]
    parameters = {f"t{number}": turn for number, turn in enumerate(turns)}
    rows = await connection.execute(text(" UNION ALL ".join(parts)), {**values, **parameters, "share": share})
    by_turn: dict[int, list[str]] = {turn: [] for turn in turns}
    for row in rows:
        by_turn[row.queue_turn].append(row.id)
    in_turn = (
        task_id for level in zip_longest(*by_turn.values()) for task_id in level if task_id is not None
    )
    return list(islice(in_turn, limit))


async def _take(connection: AsyncConnection, given: Sequence[tuple[str, TaskPoll]]) -> list[ClaimedTask]:
    """Lease tasks to the workers of polls, in the given order; tasks that others have taken meanwhile are left out.

    All tasks of a poll get the same lease, a random secret.
    """
    is_postgresql = connection.dialect.name == "postgresql"
    now = _NOW[connection.dialect.name]
    lock = " FOR NO KEY UPDATE SKIP LOCKED" if is_postgresql else ""
    least = "least" if is_postgresql else "min"
    leases = {id(poll): secrets.token_urlsafe(16) for _, poll in given}
    parts: list[str] = []
    values: dict[str, Any] = {"no": False, "task_ids": [task_id for task_id, _ in given]}
    for number, (task_id, poll) in enumerate(given):
        names = ("task_id", "owner", "request", "secret")
        parts.append("SELECT " + ", ".join(f"CAST(:{name}{number} AS text) AS {name}" for name in names))
        fields = (task_id, poll.worker_id, poll.request_id, leases[id(poll)])
        values |= {f"{name}{number}": field for name, field in zip(names, fields, strict=True)}
    returned = ", ".join(f"task.{name}" for name in _CLAIMED) if is_postgresql else ", ".join(_CLAIMED)
    statement = text(
        f"UPDATE task SET state = 'leased', fence = fence + 1, is_fresh = :no, lease = secret,"
        f" worker_id = owner, claim_id = request, claimed_at = {now}, is_acknowledged = :no,"
        f" lease_until = {now} + {FIRST_LEASE_MICROSECONDS}, deadline_at = {now} + timeout_microseconds,"
        f" check_at = {now} + {least}({FIRST_LEASE_MICROSECONDS}, timeout_microseconds), due_at = NULL,"
        f" started_at = coalesce(started_at, {now}), updated_at = {now}"
        f" FROM ({' UNION ALL '.join(parts)}) AS given"
        " WHERE task.id = given.task_id AND task.state = 'ready' AND task.id IN ("
        " SELECT id FROM task WHERE id IN :task_ids AND state = 'ready'"
        f" ORDER BY id{lock}) RETURNING {returned}"
    ).bindparams(bindparam("task_ids", expanding=True))
    rows = await connection.execute(statement, {**values, **_host_time(connection)})
    tasks = [ClaimedTask(*row) for row in rows]
    places = {task_id: place for place, (task_id, _) in enumerate(given)}
    return sorted(tasks, key=lambda task: places[task.id])


def _within_bytes(tasks: Sequence[ClaimedTask], limit: int) -> tuple[list[ClaimedTask], list[ClaimedTask]]:
    """Divide tasks into those that fit into an answer of `limit` characters, and the rest; the first one
    always fits.
    """
    for number, task in enumerate(tasks):
        limit -= task.size
        if limit < 0 and number:
            return list(tasks[:number]), list(tasks[number:])
    return list(tasks), []


async def _put_back(connection: AsyncConnection, task_ids: Sequence[str]) -> None:
    """Free leased tasks without counting an attempt."""
    statement = text(
        "UPDATE task SET state = 'ready', lease = NULL, worker_id = NULL, claim_id = NULL, claimed_at = NULL,"
        " lease_until = NULL, deadline_at = NULL, check_at = NULL WHERE id IN :task_ids AND state = 'leased'"
    ).bindparams(bindparam("task_ids", expanding=True))
    await connection.execute(statement, {"task_ids": list(task_ids)})


async def _admit(connection: AsyncConnection, *, key: str) -> set[str]:
    """Let the waiting tasks of one key be claimed, as far as places are free; return their organizations.

    No task overtakes another. At most 500 at once. The key is locked until the transaction ends.
    """
    is_postgresql = connection.dialect.name == "postgresql"
    if is_postgresql:
        # A statement of its own, so that the next one sees the commit of the previous holder.
        await connection.execute(
            text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": advisory_lock_id(f"task {key}")}
        )
    placed = await connection.scalar(
        text(
            "SELECT count(*) FROM task WHERE concurrency_key = :key"
            " AND concurrency_key IS NOT NULL AND state IN ('ready', 'leased', 'cancel_requested')"
        ),
        {"key": key},
    )
    lock = " FOR NO KEY UPDATE SKIP LOCKED" if is_postgresql else ""
    rows = (
        await connection.execute(
            text(
                "SELECT id, concurrency_limit, organization_id FROM task"
                " WHERE state = 'limited' AND concurrency_key = :key"
                f" ORDER BY is_fresh, rank, id LIMIT {ADMITTED_TOGETHER}{lock}"
            ),
            {"key": key},
        )
    ).all()
    chosen: list[str] = []
    for number, row in enumerate(rows):
        if (placed or 0) + number >= row.concurrency_limit:
            break
        chosen.append(row.id)
    if not chosen:
        return set()
    statement = text(
        f"UPDATE task SET state = 'ready', updated_at = {_NOW[connection.dialect.name]}"
        " WHERE id IN :task_ids AND state = 'limited'"
    ).bindparams(bindparam("task_ids", expanding=True))
    await connection.execute(statement, {"task_ids": chosen, **_host_time(connection)})
    return {row.organization_id for row in rows}
