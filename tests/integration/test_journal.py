"""Layers between runs and their store: group commit, a run's journal, and the lease keeper."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from engine.run_errors import LeaseLost
from engine.run_records import LogLine, NodeSpan, RunError, RunOutcome, RunStatus, SpanStatus
from journal import recorder
from journal.group_commit import GroupCommit
from journal.recorder import RENEWALS_PER_LEASE, LeaseKeeper, RunJournal, RunLease, RunRecorder
from journal.store import ClaimedRun, JournalStore, LeaseRenewal, RenewalResult, RunWrite
from models.errors import DatabaseUnavailable
from tests.integration.run_database import MigratedDatabase, RunDatabase, key_of

pytestmark = pytest.mark.every_database

PATIENCE_SECONDS = 60.0
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module", params=["on_sqlite", "on_postgres"])
def migrated_database(request: pytest.FixtureRequest) -> MigratedDatabase:
    found: MigratedDatabase = request.getfixturevalue(request.param)
    return found


async def wait_soon(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), PATIENCE_SECONDS)


# ── group commit ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class CommitControl:
    """Commit function that tests hold back or let fail."""

    batches: list[Sequence[int]] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    refusals: dict[int, Exception] = field(default_factory=dict)

    async def __call__(self, batch: Sequence[int]) -> Sequence[str]:
        self.batches.append(batch)
        self.begun.set()
        await self.go_on.wait()
        for item in batch:
            if item in self.refusals:
                raise self.refusals[item]
        return [str(item) for item in batch]


async def test_items_that_arrive_during_a_commit_share_the_next_one() -> None:
    commits = CommitControl()
    group = GroupCommit(commits, max_batch=3)
    first = group.submit(0)
    await wait_soon(commits.begun)
    others = [group.submit(item) for item in range(1, 6)]
    assert group.depth == 5
    commits.go_on.set()
    assert await first == "0"
    assert await asyncio.gather(*others) == ["1", "2", "3", "4", "5"]
    assert commits.batches == [[0], [1, 2, 3], [4, 5]]
    assert group.depth == 0


async def test_a_waiter_that_leaves_takes_nothing_with_it() -> None:
    commits = CommitControl()
    group = GroupCommit(commits)
    gone, kept = group.submit(1), group.submit(2)
    await wait_soon(commits.begun)
    gone.cancel()
    commits.go_on.set()
    assert await kept == "2"
    assert commits.batches == [[1, 2]]


async def test_one_item_that_is_refused_spoils_no_other() -> None:
    commits = CommitControl(refusals={2: ValueError("two")})
    commits.go_on.set()
    group = GroupCommit(commits)
    answers = await asyncio.gather(*map(group.submit, (1, 2, 3)), return_exceptions=True)
    assert [answers[0], type(answers[1]), answers[2]] == ["1", ValueError, "3"]


async def test_a_database_that_is_away_is_asked_once_for_all() -> None:
    commits = CommitControl(refusals={2: DatabaseUnavailable()})
    commits.go_on.set()
    group = GroupCommit(commits)
    answers = await asyncio.gather(*map(group.submit, (1, 2, 3)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {DatabaseUnavailable}
    assert commits.batches == [[1, 2, 3]]
    commits.refusals.clear()
    assert await group.submit(4) == "4"


async def test_a_group_is_drained_when_all_have_their_answers() -> None:
    commits = CommitControl()
    group = GroupCommit(commits, max_batch=1)
    futures = [group.submit(item) for item in range(3)]
    draining = asyncio.create_task(group.drain())
    await wait_soon(commits.begun)
    assert not draining.done()
    commits.go_on.set()
    await draining
    assert all(future.done() for future in futures)


# ── the journal of a run ──────────────────────────────────────────────────────────────────────────────────


class FaultyStore:
    """Store that is unavailable, or hangs, while a test says so."""

    def __init__(self, store: JournalStore) -> None:
        self._store = store
        self.is_away = False
        self.refused = asyncio.Event()
        self.error: Exception = DatabaseUnavailable()
        self.answers = asyncio.Event()
        self.answers.set()

    async def record(self, batch: Sequence[RunWrite]) -> frozenset[str]:
        await self.answers.wait()
        if self.is_away:
            self.refused.set()
            raise self.error
        return await self._store.record(batch)


@dataclass
class JournalHarness:
    """A claimed run, its lease and its journal."""

    run: ClaimedRun
    lease: RunLease
    journal: RunJournal
    store: FaultyStore
    committed: list[str]


@pytest.fixture
async def journal_harness(run_database: RunDatabase, monkeypatch: pytest.MonkeyPatch) -> JournalHarness:
    monkeypatch.setattr(recorder, "RETRY_SECONDS", 0.01)
    run = await run_database.accept_and_claim()
    lease = RunLease(key_of(run), run.token, time.monotonic() + 60)
    store = FaultyStore(run_database.store)
    committed: list[str] = []
    recorded = RunRecorder(store, lambda channels, _outcomes: committed.extend(channels))  # type: ignore[arg-type]  # a partial store
    journal = RunJournal(recorded, lease, settled=["earlier"])
    return JournalHarness(run, lease, journal, store, committed)


def make_span(node_id: str, sequence: int, status: SpanStatus = SpanStatus.COMPLETED) -> NodeSpan:
    return NodeSpan(node_id, node_id, "set", status, sequence, NOW, NOW)


async def test_records_are_durable_after_the_commit_and_waiters_are_notified(
    run_database: RunDatabase, journal_harness: JournalHarness
) -> None:
    journal_harness.journal.record(make_span("a", 1, SpanStatus.RUNNING))
    journal_harness.journal.record(make_span("a", 2))
    journal_harness.journal.log(LogLine("info", "hello", "a", 3, NOW))
    assert await run_database.count("span") == 0
    await journal_harness.journal.commit()
    spans = (await run_database.store.spans([key_of(journal_harness.run)]))[journal_harness.run.execution_id]
    assert [(one.node_id, one.status) for one in spans] == [("a", SpanStatus.COMPLETED)]
    assert await run_database.count("log_line") == 1
    assert (await run_database.row(journal_harness.run.execution_id))["completed_nodes"] == 2
    assert journal_harness.committed == [journal_harness.run.execution_id]
    await journal_harness.journal.commit()
    assert journal_harness.committed == [journal_harness.run.execution_id]


async def test_a_question_about_a_tool_call_counts_as_no_node(
    run_database: RunDatabase, journal_harness: JournalHarness
) -> None:
    question = replace(make_span("send", 1), type="tool", iteration="1-0000000000000000")
    journal_harness.journal.record(question)
    await journal_harness.journal.commit()
    assert (await run_database.row(journal_harness.run.execution_id))["completed_nodes"] == 1


async def test_a_loop_counts_when_it_is_through_and_the_nodes_in_it_once(
    run_database: RunDatabase, journal_harness: JournalHarness
) -> None:
    async def settled(*spans: NodeSpan) -> int:
        for one in spans:
            journal_harness.journal.record(one)
        await journal_harness.journal.commit()
        completed: int = (await run_database.row(journal_harness.run.execution_id))["completed_nodes"]
        return completed - 1

    def turn(number: int) -> NodeSpan:
        return replace(make_span("loop", number), iteration=str(number), port="continue")

    def step(number: int) -> NodeSpan:
        return replace(make_span("a", number), iteration=str(number), port="output", hashes=b"hashes")

    assert await settled(make_span("loop", 1, SpanStatus.RUNNING), turn(2), step(3)) == 1
    assert await settled(turn(4), step(5)) == 1
    assert await settled(make_span("loop", 6)) == 2


async def test_progress_grows_with_commits_and_is_never_taken_back(
    run_database: RunDatabase, journal_harness: JournalHarness
) -> None:
    async def progress(share: float, number: int) -> int:
        journal_harness.journal.advance(share)
        journal_harness.journal.record(make_span("a", number))
        await journal_harness.journal.commit()
        percent: int = (await run_database.row(journal_harness.run.execution_id))["progress"]
        return percent

    assert [await progress(share, number) for number, share in enumerate([0.1, 0.2, 0.005])] == [10, 30, 30]
    # The next owner of the run counts from zero.
    journal_harness.journal.advance(-0.3)
    assert await progress(0.1, 4) == 30
    journal_harness.journal.advance(1.0)
    await journal_harness.journal.end(RunOutcome(RunStatus.COMPLETED))
    (shown,) = await run_database.store.progress([key_of(journal_harness.run)])
    assert (shown.percent, shown.status) == (99, "completed")


async def test_the_end_is_committed_with_pending_records(
    run_database: RunDatabase, journal_harness: JournalHarness
) -> None:
    journal_harness.journal.record(make_span("a", 1))
    error = RunError("node-error", "broken", "a", 1)
    await journal_harness.journal.end(RunOutcome(RunStatus.FAILED, error=error))
    row = await run_database.row(journal_harness.run.execution_id)
    assert (row["status"], row["completed_nodes"]) == ("failed", 2)
    assert await run_database.count("span") == 1


async def test_commits_of_one_run_keep_their_order(
    run_database: RunDatabase, journal_harness: JournalHarness
) -> None:
    for sequence in range(1, 30):
        journal_harness.journal.record(make_span("a", sequence))
    commits = [asyncio.create_task(journal_harness.journal.commit())]
    await asyncio.sleep(0)
    journal_harness.journal.record(make_span("a", 30))
    commits.append(asyncio.create_task(journal_harness.journal.commit()))
    await asyncio.sleep(0)
    ending = asyncio.create_task(journal_harness.journal.end(RunOutcome(RunStatus.COMPLETED)))
    await asyncio.gather(*commits, ending)
    (kept,) = (await run_database.store.spans([key_of(journal_harness.run)]))[
        journal_harness.run.execution_id
    ]
    assert kept.sequence == 30


async def test_a_commit_with_nothing_to_add_waits_for_the_one_under_way(
    journal_harness: JournalHarness,
) -> None:
    journal_harness.store.answers.clear()
    journal_harness.journal.record(make_span("a", 1))
    commits = [asyncio.create_task(journal_harness.journal.commit()) for _ in range(2)]
    done, _ = await asyncio.wait(commits, timeout=0.05)
    assert not done
    journal_harness.store.answers.set()
    await asyncio.gather(*commits)


async def test_a_database_that_comes_back_in_time_is_waited_for(
    run_database: RunDatabase, journal_harness: JournalHarness
) -> None:
    journal_harness.store.is_away = True
    journal_harness.journal.record(make_span("a", 1))
    commit = asyncio.create_task(journal_harness.journal.commit())
    await wait_soon(journal_harness.store.refused)
    assert not commit.done()
    journal_harness.store.is_away = False
    await commit
    assert await run_database.count("span") == 1


async def test_a_run_is_given_up_when_its_token_is_not_the_newest(
    run_database: RunDatabase, journal_harness: JournalHarness
) -> None:
    await run_database.expire(journal_harness.run)
    await run_database.store.sweep(10)
    journal_harness.journal.record(make_span("a", 1))
    with pytest.raises(LeaseLost):
        await journal_harness.journal.commit()
    assert await run_database.count("span") == 0
    assert journal_harness.committed == []


async def test_a_commit_is_waited_for_no_longer_than_the_lease_lasts(journal_harness: JournalHarness) -> None:
    journal_harness.store.answers.clear()
    journal_harness.journal.record(make_span("a", 1))
    journal_harness.lease.until = time.monotonic() + 0.5
    commit = asyncio.create_task(journal_harness.journal.commit())
    await asyncio.sleep(0)
    journal_harness.lease.until = time.monotonic() + 5  # it was renewed meanwhile
    done, _ = await asyncio.wait([commit], timeout=0.6)
    assert not done
    with pytest.raises(LeaseLost):
        await asyncio.wait_for(commit, PATIENCE_SECONDS)
    journal_harness.store.answers.set()


@pytest.mark.parametrize("error", [DatabaseUnavailable(), ValueError("can't be stored")])
async def test_nothing_follows_a_write_that_was_lost_even_if_the_lease_holds_again(
    run_database: RunDatabase, journal_harness: JournalHarness, error: Exception
) -> None:
    journal_harness.store.is_away, journal_harness.store.error = True, error
    journal_harness.journal.record(make_span("a", 1))
    if isinstance(error, DatabaseUnavailable):
        journal_harness.lease.until = time.monotonic() - 1
    with pytest.raises((LeaseLost, ValueError)):
        await journal_harness.journal.commit()

    journal_harness.store.is_away = False
    journal_harness.lease.until = time.monotonic() + 60
    assert not journal_harness.journal.holds_lease()
    journal_harness.journal.record(make_span("b", 2))
    for late in (
        journal_harness.journal.commit(),
        journal_harness.journal.commit(),
        journal_harness.journal.end(RunOutcome(RunStatus.COMPLETED)),
    ):
        with pytest.raises(LeaseLost):
            await late
    assert await run_database.count("span") == 0
    assert (await run_database.row(journal_harness.run.execution_id))["status"] == "running"


# ── leases ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class LeaseKeeperHarness:
    """Lease keeper, and its notifications."""

    keeper: LeaseKeeper
    lost: list[RunLease] = field(default_factory=list)
    requests: list[tuple[RunLease, str]] = field(default_factory=list)

    def hold(self, run: ClaimedRun) -> RunLease:
        return self.keeper.hold(key_of(run), run.token, time.monotonic())


async def make_keeper(store: JournalStore, lease_seconds: float) -> LeaseKeeperHarness:
    lost: list[RunLease] = []
    requests: list[tuple[RunLease, str]] = []
    keeper = LeaseKeeper(
        store,
        lease_seconds,
        on_lost=lost.append,
        on_request=lambda lease, request: requests.append((lease, request)),
    )
    keeper.start()
    return LeaseKeeperHarness(keeper, lost, requests)


async def test_leases_are_renewed_while_work_blocks_the_event_loop(run_database: RunDatabase) -> None:
    kept = await make_keeper(run_database.store, 3.0)
    run = await run_database.accept_and_claim()
    lease = kept.hold(run)
    for _ in range(2):
        renewed = lease.until
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while lease.until == renewed and time.monotonic() < give_up_at:
            time.sleep(0.01)  # noqa: ASYNC251 - as a node that computes for long does
        assert lease.until > renewed
    assert lease.is_held()
    row = await run_database.row(run.execution_id)
    assert row["lease_until"] > time.time_ns() // 1000
    kept.keeper.release(lease)
    kept.keeper.stop()


async def test_a_lease_ends_for_its_holder_before_it_ends_in_the_database(run_database: RunDatabase) -> None:
    kept = await make_keeper(run_database.store, 100.0)
    run = await run_database.accept_and_claim()
    since = time.monotonic() - 86
    assert not kept.keeper.hold(key_of(run), run.token, since).is_held()
    assert kept.keeper.hold(key_of(run), run.token, since + 2).is_held()
    kept.keeper.stop()


async def test_renewals_report_lost_leases_and_control_requests(run_database: RunDatabase) -> None:
    kept = await make_keeper(run_database.store, 1.5)
    place = await run_database.workflow()
    lost, asked = [kept.hold(await run_database.accept_and_claim(place)) for _ in range(2)]
    await run_database.query("UPDATE execution SET token = 9 WHERE id = :id", id=lost.key.execution_id)
    await run_database.store.request_end(asked.key, "stop")
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (kept.lost and kept.requests):  # noqa: ASYNC110 - it tells from another thread
            await asyncio.sleep(0.01)
    assert kept.lost[0] is lost
    assert kept.requests[0] == (asked, "stop")
    assert not any(lease is asked for lease in kept.lost)
    kept.keeper.stop()


@pytest.mark.parametrize("error", [DatabaseUnavailable(), ValueError("a surprise")])
async def test_a_renewal_that_fails_is_tried_again(run_database: RunDatabase, error: Exception) -> None:
    failures = 0

    class FailsAtFirst:
        async def for_thread(self) -> Any:  # noqa: ANN401 - any JSON value
            return self

        async def renew(self, held: Sequence[LeaseRenewal], lease_seconds: float) -> Sequence[RenewalResult]:
            nonlocal failures
            failures += 1
            if failures < 3:
                raise error
            return [RenewalResult(one.execution_id, None) for one in held if lease_seconds]

        async def close(self) -> None: ...

    with capture_logs():
        kept = await make_keeper(FailsAtFirst(), 0.15)  # type: ignore[arg-type]  # a partial store
        lease = kept.hold(await run_database.accept_and_claim())
        first_end = lease.until
        async with asyncio.timeout(PATIENCE_SECONDS):
            while lease.until == first_end:  # noqa: ASYNC110 - it is renewed from another thread
                await asyncio.sleep(0.01)
        kept.keeper.stop()
    assert failures >= 3


async def test_a_locked_lease_does_not_delay_the_renewal_of_others(
    run_database: RunDatabase,
) -> None:
    kept_back, rounds = await run_database.accept_and_claim(), list[float]()
    longest = 0.3 / RENEWALS_PER_LEASE * 1.5

    class LocksOne:
        async def for_thread(self) -> Any:  # noqa: ANN401 - any JSON value
            return self

        async def renew(self, held: Sequence[LeaseRenewal], lease_seconds: float) -> Sequence[RenewalResult]:
            if len(held) > 1:
                rounds.append(time.monotonic())
            is_kept_back = {one.execution_id: one.execution_id == kept_back.execution_id for one in held}
            return [
                RenewalResult(key, None, is_locked=locked)
                for key, locked in is_kept_back.items()
                if lease_seconds
            ]

        async def close(self) -> None: ...

    with capture_logs():
        kept = await make_keeper(LocksOne(), 0.3)  # type: ignore[arg-type]  # a partial store
        for one in (kept_back, await run_database.accept_and_claim()):
            kept.hold(one)
        async with asyncio.timeout(PATIENCE_SECONDS):
            # Until one is as short as it should be, since a busy machine makes any of them longer.
            while not any(later - earlier < longest for earlier, later in pairwise([*rounds])):  # noqa: ASYNC110 - they are made by another thread
                await asyncio.sleep(0.01)
        kept.keeper.stop()
