"""Reads what has arrived as it came, so that it can be run: claimed under a lease, taken apart in threads.

Whatever becomes of the process, its row is there: it is read again by another, and left once, by a guarded update.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from hashlib import sha256
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from concurrency import offload
from engine.run_errors import NodeError
from engine.run_records import RunError, RunOutcome, RunStatus
from engine.services import RunCaller
from execution import due_runs
from execution.trials import TRIAL_SECONDS, SuspectSearch, TrialGate
from journal import concurrency_limits, unparsed_mail
from journal.blobs.blob_storage import BlobLost, BlobOwner, BlobsUnavailable
from journal.group_commit import GroupCommit
from journal.leases import LeaseKeeper, RunLease
from journal.store import ClaimQuery, ExecutionKey, RunWrite
from journal.unparsed_mail import MailParseResult, MailRunState, UnparsedMail
from mail import addresses, mail_content
from mail.mail_limits import InvalidMail
from messages import wakeups
from messages.broker import BrokerUnavailable
from models.errors import DatabaseUnavailable
from models.execution import UNPARSED_TARGET
from models.execution_status import TERMINAL_STATUSES
from workers import mail_triggers

if TYPE_CHECKING:
    from engine.services import DataSourceService, ThrottleService
    from journal.blobs.blob_store import BlobStore
    from journal.store import ClaimedRun, JournalStore
    from journal.unparsed_mail import ScreeningRules
    from mail.mail_content import AttachmentLabel, KeepAttachment, ParsedMailContent
    from mail.reception import MailReception
    from messages.broker import Broker
    from models.database import Database
    from workers.settings import WorkerSettings

log = structlog.get_logger()

PARSER_THREADS: Final = 2
MAX_LARGE_MAILS: Final = 2
"""Mails that are too large for their rows: each is in memory while it is read."""
MAX_CLAIMED_MAILS: Final = 32
MAX_MAIL_BYTES: Final = 50_000_000
FETCH_SECONDS: Final = 60.0
FIRST_RETRY: Final = timedelta(seconds=5)
LAST_RETRY: Final = timedelta(minutes=15)
MAX_RETRY_TIME: Final = timedelta(days=1)
"""What can't be had for so long won't be."""
MAX_REPLIES: Final = 10
REPLY_WINDOW_SECONDS: Final = 3_600.0
"""So many mails of one sender within this time may answer those that workflows have sent; more are a loop."""
CLOSE_SECONDS: Final = 2.0
PAUSE_SECONDS: Final = 0.5
INVALID_INPUT_CODE: Final = "invalid-input"
MAIL_LOOP_CODE: Final = "mail-loop"
MAIL_REJECTED_CODE: Final = "mail-rejected"
_encode = msgspec.json.Encoder().encode


class MailUnavailable(Exception):
    """What is to be read can't be had at this moment."""


class AttachmentNotStored(Exception):
    """Storing an attachment failed for the reason in `__cause__`, which says nothing about the mail."""


@dataclass(frozen=True, slots=True)
class MailSources:
    """What is read from besides blobs, and how often."""

    data_sources: DataSourceService
    throttle: ThrottleService


@dataclass(frozen=True, slots=True)
class ParsedMail:
    """A mail that was read, and what its run is given."""

    mail: ParsedMailContent
    received: MailReception
    screening: ScreeningRules | None
    """Rules of the trigger; None: the mail was redriven, and is run whatever it is."""
    trigger: dict[str, Any]
    text: str
    """The trigger as JSON."""


@dataclass(slots=True, eq=False)
class MailParseTask:
    """A mail that this process reads."""

    claim: ClaimedRun
    lease: RunLease
    begun_at: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] = field(init=False)
    is_asked_to_end: bool = False
    is_over: bool = False
    """Nobody waits for it any more."""
    putting: Future[Any] | None = None

    @property
    def key(self) -> ExecutionKey:
        return ExecutionKey(self.claim.execution_id, self.claim.shard)

    @property
    def owner(self) -> BlobOwner:
        return BlobOwner(self.claim.organization_id, self.claim.key_id)

    @property
    def caller(self) -> RunCaller:
        one = self.claim
        return RunCaller(one.organization_id, one.user_id, one.workflow_id, one.execution_id, one.key_id)

    def give_up(self) -> None:
        """Let the thread at work on it end with its next attachment."""
        self.is_over = True
        if self.putting is not None:
            self.putting.cancel()


class MailParser:
    """One process's share of the reading."""

    def __init__(
        self,
        database: Database,
        store: JournalStore,
        broker: Broker,
        blobs: BlobStore,
        sources: MailSources,
        settings: WorkerSettings,
        *,
        on_left: Callable[[ClaimedRun, RunOutcome], None],
        isolation: TrialGate,
    ) -> None:
        """`on_left` is told of runs that have ended here, if their end is to be followed up."""
        self._database = database
        self._store = store
        self._broker = broker
        self._blobs = blobs
        self._sources = sources
        self._settings = settings
        self._on_left = on_left
        # Not that of the executor, which releases what it doesn't know of.
        self._owner = f"{broker.channel}.reader"
        self._leases = LeaseKeeper(
            store, settings.lease_seconds, on_lost=self._on_lease_lost, on_request=self._on_request
        )
        self._threads = ThreadPoolExecutor(
            PARSER_THREADS,
            thread_name_prefix="mail-reading",
            initializer=lambda: sys.setswitchinterval(offload.SWITCH_SECONDS),
        )
        self._large = asyncio.Semaphore(MAX_LARGE_MAILS)
        self._leaving: GroupCommit[MailParseResult, MailRunState | None] = GroupCommit(self._hand_off)
        self._readings: dict[str, MailParseTask] = {}
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._isolation = isolation
        self._isolation.join(self._is_proven)
        self._is_claiming = False
        self._suspects = SuspectSearch(store, settings, UNPARSED_TARGET)
        self._wanted = asyncio.Event()
        self._is_draining = False
        self._after_organization = ""
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to read."""
        self._leases.start()
        self._broker.start_mail_parser(self._wanted.set)
        self._serving = asyncio.create_task(self._parse_forever())
        self._wanted.set()

    async def close(self) -> None:
        """Read no more, and give back what isn't read to its end."""
        self._is_draining = True
        await self._broker.stop_mail_parser()
        if self._serving is not None:
            self._wanted.set()
            await asyncio.wait([self._serving], timeout=CLOSE_SECONDS)
            self._serving.cancel()
        if self._readings:
            await asyncio.wait([one.task for one in self._readings.values()], timeout=CLOSE_SECONDS)
        for reading in list(self._readings.values()):
            reading.task.cancel()
        tasks = [*(one.task for one in self._readings.values()), *self._side_tasks]
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._leaving.drain()
        self._leases.stop()
        with suppress(DatabaseUnavailable):
            await self._store.release(self._owner, [])
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ── claiming ────────────────────────────────────────────────────────────────────────────────────────────

    async def _parse_forever(self) -> None:
        """Look whenever somebody says that something is there, and now and then without: this is the outermost loop."""
        while not self._is_draining:
            # Spread out, so that readers that were started together don't all look at once.
            seconds = self._settings.sweep_seconds * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._try_suspects()
                await self._claim()
            except DatabaseUnavailable as error:
                log.warning("database not reached", duty="read what has arrived", error=str(error))
                await asyncio.sleep(PAUSE_SECONDS)
            except Exception:
                log.exception("duty failed", duty="read what has arrived")
                await asyncio.sleep(PAUSE_SECONDS)

    def _is_proven(self) -> bool:
        """Tell whether nothing is read here that has not shown that it is harmless."""
        return not self._is_claiming and all(
            time.monotonic() - reading.begun_at >= TRIAL_SECONDS for reading in self._readings.values()
        )

    async def _try_suspects(self) -> None:
        """Read a suspect apart from whatever else the process does."""
        max_isolation_losses = None if self._is_draining else await self._suspects.find()
        if max_isolation_losses is None:
            return
        async with self._isolation.run_trial():
            claim = ClaimQuery(
                self._owner,
                self._settings.lease_seconds,
                limit=1,
                target=UNPARSED_TARGET,
                is_trial=True,
                max_isolation_losses=max_isolation_losses,
            )
            for reading in await self._claim_batch(claim):
                log.info(
                    "suspect on trial", execution_id=reading.claim.execution_id, attempt=reading.claim.attempt
                )
                await asyncio.wait([reading.task], timeout=TRIAL_SECONDS)
                if not reading.task.done():
                    await self._store_end(reading, has_passed=True)

    async def _claim(self) -> None:
        await self._isolation.pass_gate()
        places = MAX_CLAIMED_MAILS - len(self._readings)
        if self._is_draining or places <= 0:
            return  # whatever is read to its end looks again
        claim = ClaimQuery(
            self._owner,
            self._settings.lease_seconds,
            places,
            after_organization=self._after_organization,
            target=UNPARSED_TARGET,
        )
        self._is_claiming = True
        try:
            taken = await self._claim_batch(claim)
        finally:
            self._is_claiming = False
        if taken:
            self._after_organization = taken[-1].claim.organization_id
            self._wanted.set()

    async def _claim_batch(self, claim: ClaimQuery) -> Sequence[MailParseTask]:
        since = time.monotonic()
        try:
            claimed = await self._store.claim(claim)
        except DatabaseUnavailable:
            # A claim may be made though its answer was lost.
            await self._store.release(self._owner, self._leases.execution_ids())
            raise
        taken: list[MailParseTask] = []
        for one in claimed:
            key = ExecutionKey(one.execution_id, one.shard)
            reading = MailParseTask(one, self._leases.hold(key, one.token, since))
            self._readings[one.execution_id] = reading
            reading.task = asyncio.create_task(self._parse_and_finish(reading))
            if one.request is not None:
                self._on_request(reading.lease, one.request)
            taken.append(reading)
        return taken

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _parse_and_finish(self, reading: MailParseTask) -> None:
        """Read one mail and leave its row; what breaks leaves the row to its lease, and counts as an attempt."""
        try:
            await self._parse_claimed(reading)
        except asyncio.CancelledError:
            reading.give_up()
            raise
        except (DatabaseUnavailable, BrokerUnavailable) as error:
            log.warning("mail not left", execution_id=reading.claim.execution_id, error=str(error))
        except Exception:
            log.exception("reading broke", execution_id=reading.claim.execution_id)
        finally:
            self._leases.release(reading.lease)
            if self._readings.get(reading.claim.execution_id) is reading:
                del self._readings[reading.claim.execution_id]
            self._wanted.set()

    async def _parse_claimed(self, reading: MailParseTask) -> None:
        try:
            parsed = await self._parse(reading)
            if (refusal := await self._rejection_reason(reading, parsed)) is not None:
                await self._end(reading, RunStatus.CANCELLED, refusal)
                return
        except InvalidMail as error:
            await self._end(
                reading,
                RunStatus.FAILED,
                RunError(INVALID_INPUT_CODE, f"The mail can't be read: {error.message}"),
            )
            return
        except MailUnavailable as error:
            await self._postpone(reading, str(error))
            return
        one = reading.claim
        left = await self._leaving.submit(
            MailParseResult(reading.key, one.token, self._owner, one.workflow_id, parsed.trigger, parsed.text)
        )
        if left is None:
            log.warning("mail abandoned", execution_id=one.execution_id, reason="lease lost")
            return
        log.info("mail read", execution_id=one.execution_id, workflow_id=one.workflow_id)
        await self._notify_next(reading, left)

    async def _parse(self, reading: MailParseTask) -> ParsedMail:
        """Return a mail, and what its run is given; raises `InvalidMail` and `NotNow`."""
        try:
            found = UnparsedMail.from_text(reading.claim.trigger)
        except msgspec.DecodeError as error:
            raise InvalidMail("what was kept of it is not understood") from error
        async with AsyncExitStack() as stack:
            if found.blob is not None or found.stored is not None:
                await stack.enter_async_context(self._large)
            contents = [await self._read_content(reading, found)]
            loop = asyncio.get_running_loop()
            work = partial(self._parse_in_thread, reading, found, contents, loop)
            try:
                return await loop.run_in_executor(self._threads, work)
            except BlobsUnavailable as error:
                raise MailUnavailable(str(error)) from error

    async def _read_content(self, reading: MailParseTask, found: UnparsedMail) -> bytes:
        """Return a mail as it was handed in; raises `InvalidMail` and `NotNow`."""
        if found.blob is not None:
            return await self._read_blob(reading.owner, found.blob.sha256)
        if found.stored is None:
            return found.content
        try:
            bucket = await self._sources.data_sources.bucket(reading.caller, found.stored.source_id)
            return await bucket.get(found.stored.key, max_bytes=MAX_MAIL_BYTES, timeout_seconds=FETCH_SECONDS)
        except NodeError as error:
            if error.code == "object-too-large":
                raise InvalidMail(error.message) from error
            # An object may be there a little later, and rights and secrets may be mended.
            raise MailUnavailable(error.message) from error

    async def _read_blob(self, owner: BlobOwner, digest: str) -> bytes:
        """Return a content that is in memory once: to join its pieces would take that twice."""
        written = BytesIO()
        try:
            async with asyncio.timeout(FETCH_SECONDS), self._blobs.open(owner, digest) as opened:
                async for chunk in opened.chunks:
                    written.write(chunk)
        except BlobLost as error:
            raise InvalidMail("what was kept of it is lost") from error
        except (BlobsUnavailable, TimeoutError) as error:
            raise MailUnavailable("The blob storage does not answer") from error
        return written.getvalue()

    def _parse_in_thread(
        self,
        reading: MailParseTask,
        found: UnparsedMail,
        contents: list[bytes],
        loop: asyncio.AbstractEventLoop,
    ) -> ParsedMail:
        """Take a mail apart in a thread, which waits for each attachment to be kept before it decodes the next.

        Raises `InvalidMail` for any exception of a parser: to try again would end the same way.
        """
        references: list[dict[str, Any]] = []
        try:
            mail, received = mail_triggers.parse_mail(
                found, contents, self._attachment_keeper(reading, references, loop)
            )
            trigger = mail_triggers.build_trigger(mail, received, references)
            return ParsedMail(mail, received, found.screening, trigger, _encode(trigger).decode())
        except AttachmentNotStored as error:
            raise error.__cause__ or error from None
        except (InvalidMail, MailUnavailable, MemoryError):
            raise
        except Exception as error:
            log.exception("mail parser failed", execution_id=reading.claim.execution_id)
            raise InvalidMail(
                f"parsing it raised {type(error).__name__}; redrive its delivery once the server is updated"
            ) from error

    def _attachment_keeper(
        self, reading: MailParseTask, references: list[dict[str, Any]], loop: asyncio.AbstractEventLoop
    ) -> KeepAttachment:
        def keep(label: AttachmentLabel, pieces: Iterator[bytes]) -> None:
            put = self._blobs.put(
                reading.owner,
                mail_content.join_pieces(pieces),
                media_type=label.media_type,
                name=label.filename,
            )
            if reading.is_over:
                put.close()
                raise MailUnavailable("Nobody waits for it any more")
            reading.putting = asyncio.run_coroutine_threadsafe(put, loop)
            try:
                reference = reading.putting.result()
            except Exception as error:
                raise AttachmentNotStored from error
            references.append(reference.as_json())

        return keep

    async def _rejection_reason(self, reading: MailParseTask, parsed: ParsedMail) -> RunError | None:
        """Return why a mail is not to be run.

        Its trigger rejects it, nobody wrote it, or it may be one of many that answer one another.
        """
        if (reason := mail_triggers.rejection_reason(parsed.received, parsed.screening)) is not None:
            return RunError(MAIL_REJECTED_CODE, reason)
        accepts_automatic = parsed.screening is None or parsed.screening.accept_automatic
        if not accepts_automatic and mail_triggers.is_automatic(parsed.mail):
            kinds = "an automatic reply, a bounce or a receipt"
            return RunError(
                MAIL_LOOP_CODE, f"The mail is {kinds}; `acceptAutomatic` on the trigger runs those too"
            )
        reason = await self._loop_reason(reading, parsed.mail)
        return None if reason is None else RunError(MAIL_LOOP_CODE, reason)

    async def _loop_reason(self, reading: MailParseTask, mail: ParsedMailContent) -> str | None:
        """Return why a mail is not to be run, if it may be one of many that answer one another."""
        if not mail_triggers.is_reply_to_workflow(mail):
            return None
        sender = ",".join(addresses.bare_addresses(mail.from_)).lower()
        digest = sha256(sender.encode()).hexdigest()[:32]
        try:
            await self._sources.throttle.reserve(
                reading.caller,
                f"mails:{reading.claim.workflow_id}:{digest}",
                limit=MAX_REPLIES,
                per_seconds=REPLY_WINDOW_SECONDS,
                max_wait_seconds=REPLY_WINDOW_SECONDS * (MAX_REPLIES - 1) / MAX_REPLIES,
            )
        except NodeError as error:
            if error.code != "throttled":
                raise MailUnavailable(error.message) from error
            return (
                f"More than {MAX_REPLIES} mails of one sender have answered mails of workflows within an hour"
            )
        return None

    # ── leaving ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _hand_off(self, batch: Sequence[MailParseResult]) -> Sequence[MailRunState | None]:
        return await self._database.transaction(partial(unparsed_mail.release_parsed, batch=batch))

    async def _notify_next(self, reading: MailParseTask, left: MailRunState) -> None:
        """Tell those who go on with a run; what fails here, a sweep sees to."""
        if left.status in TERMINAL_STATUSES:
            status = RunStatus(left.status.value)
            await self._on_ended(reading, RunOutcome(status, left.error), left.channel)
        elif left.concurrency_key is not None:
            if await concurrency_limits.admit_waiting_runs(self._database, left.concurrency_key):
                await wakeups.wake_workers(self._broker)
        elif left.assigned_deployment_id is not None:
            await due_runs.wake_due_deployments(self._database, self._broker)
        else:
            await wakeups.wake_workers(self._broker)

    async def _end(self, reading: MailParseTask, status: RunStatus, error: RunError) -> None:
        if not await self._store_end(reading, end=status, error=error):
            return
        if error.code in {MAIL_LOOP_CODE, MAIL_REJECTED_CODE}:
            reason = f"{error.code}: {error.message}"
            await self._database.transaction(
                partial(unparsed_mail.note_rejection, key=reading.key, reason=reason)
            )
        await self._on_ended(reading, RunOutcome(status, error), reading.claim.channel)

    async def _postpone(self, reading: MailParseTask, reason: str) -> None:
        """Let a mail be read later, and ever later; after a day it has failed."""
        now = self._store.clock.now()
        age = now - reading.claim.started_at
        if age > MAX_RETRY_TIME:
            message_ = f"The mail could not be read for a day: {reason}"
            await self._end(reading, RunStatus.FAILED, RunError(INVALID_INPUT_CODE, message_))
            return
        log.warning("mail not read yet", execution_id=reading.claim.execution_id, reason=reason)
        due_at = now + min(max(age / 2, FIRST_RETRY), LAST_RETRY)
        await self._store_end(
            reading, end=RunStatus.WAITING, due_at=due_at, wait_answer_count=reading.claim.wait_answer_count
        )

    async def _store_end(self, reading: MailParseTask, **fields: Any) -> bool:  # noqa: ANN401 - fields of any type
        """Write what has become of a run; returns False where its lease was lost."""
        one = reading.claim
        write = RunWrite(one.execution_id, one.shard, one.token, **fields)
        return one.execution_id in await self._store.record([write], owner=self._owner)

    async def _on_ended(self, reading: MailParseTask, ended: RunOutcome, channel: str) -> None:
        one = reading.claim
        log.info(
            "mail not run",
            status=ended.status.value,
            execution_id=one.execution_id,
            workflow_id=one.workflow_id,
            error=ended.error.code if ended.error else None,
        )
        if one.follow_up is not None:
            self._on_left(one, ended)
        with suppress(BrokerUnavailable):
            await self._broker.publish({one.execution_id: channel})

    # ── what others say ─────────────────────────────────────────────────────────────────────────────────────

    def _on_lease_lost(self, lease: RunLease) -> None:
        reading = self._task_of(lease)
        if reading is not None:
            reading.task.cancel()

    def _on_request(self, lease: RunLease, _request: str) -> None:
        reading = self._task_of(lease)
        if reading is not None and not reading.is_asked_to_end:
            reading.is_asked_to_end = True
            self._in_background(partial(self._release, reading))

    async def _release(self, reading: MailParseTask) -> None:
        """Give a run back that a client has asked to end: it ends by that."""
        reading.task.cancel()
        await asyncio.wait([reading.task])
        if await self._store_end(reading, end=RunStatus.RELEASED):
            with suppress(BrokerUnavailable):
                await self._broker.publish({reading.claim.execution_id: reading.claim.channel})

    def _task_of(self, lease: RunLease) -> MailParseTask | None:
        reading = self._readings.get(lease.key.execution_id)
        return reading if reading is not None and reading.lease is lease else None

    def _in_background(self, work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(self._suppress_outages(work))
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)

    async def _suppress_outages(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do what the lease's end does otherwise."""
        try:
            await work()
        except (BrokerUnavailable, DatabaseUnavailable) as error:
            log.debug("not done", error=str(error))
        except Exception:
            log.exception("not done")
