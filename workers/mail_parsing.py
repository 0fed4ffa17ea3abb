"""Parsing of inbound mail before its runs: mails are claimed under a lease and parsed in threads.

A mail survives the process in its row. Another process then parses it again; a guarded update finishes it
only once.
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
from msgspec import Struct

from concurrency import offload
from engine.run_errors import NodeError
from engine.run_records import RunError, RunOutcome, RunStatus
from engine.services import RunCaller
from execution import due_runs
from execution.trials import TRIAL_SECONDS, SuspectSearch, TrialGate
from journal import concurrency_limits, unparsed_mail
from journal.blobs.blob_storage import BlobLost, BlobOwner, BlobsUnavailable
from journal.group_commit import GroupCommit
from journal.recorder import LeaseKeeper, RunLease
from journal.store import ClaimQuery, ExecutionKey, RunWrite
from journal.unparsed_mail import MailParseResult, MailRunState, UnparsedMail
from mail import headers, mail_content, mail_parsing, service_forms
from mail.mail_limits import InvalidMail
from messages import wakeups
from messages.broker import BrokerUnavailable
from models.errors import DatabaseUnavailable
from models.execution import UNPARSED_TARGET
from models.execution_status import TERMINAL_STATUSES

if TYPE_CHECKING:
    from engine.services import DataSourceService, ThrottleService
    from journal.blobs.blob_store import BlobStore
    from journal.store import ClaimedRun, JournalStore
    from journal.unparsed_mail import ScreeningRules
    from mail.mail_content import AttachmentLabel, KeepAttachment, ParsedMailContent
    from mail.service_forms import MailReception
    from messages.broker import Broker
    from models.database import Database
    from workers.settings import WorkerSettings

log = structlog.get_logger()

PARSER_THREADS: Final = 2
MAX_LARGE_MAILS: Final = 2
"""Concurrent mails that are too large for their rows: each is in memory while it is parsed."""
MAX_CLAIMED_MAILS: Final = 32
MAX_MAIL_BYTES: Final = 50_000_000
FETCH_SECONDS: Final = 60.0
FIRST_RETRY: Final = timedelta(seconds=5)
LAST_RETRY: Final = timedelta(minutes=15)
MAX_RETRY_TIME: Final = timedelta(days=1)
"""Age after which an unavailable mail fails."""
MAX_REPLIES: Final = 10
REPLY_WINDOW_SECONDS: Final = 3_600.0
"""Up to `MAX_REPLIES` mails of one sender in this time may answer mails of workflows; more are a mail loop."""
CLOSE_SECONDS: Final = 2.0
PAUSE_SECONDS: Final = 0.5
INVALID_INPUT_CODE: Final = "invalid-input"
MAIL_LOOP_CODE: Final = "mail-loop"
MAIL_REJECTED_CODE: Final = "mail-rejected"
_encode = msgspec.json.Encoder().encode


class MailUnavailable(Exception):
    """Temporary failure to read a mail."""


class AttachmentNotStored(Exception):
    """Failure to store an attachment, for the reason in `__cause__`, which is no fault of the mail."""


class MailSources(Struct, frozen=True):
    """Sources of mails besides blobs, and the rate limit against mail loops."""

    data_sources: DataSourceService
    throttle: ThrottleService


class ParsedMail(Struct, frozen=True):
    """Parsed mail with the trigger output for its run."""

    mail: ParsedMailContent
    received: MailReception
    screening: ScreeningRules | None
    """Rules of the trigger; None for a redriven mail, which always runs."""
    trigger: dict[str, Any]
    text: str
    """Trigger output as JSON."""


@dataclass(slots=True, eq=False)
class MailParseTask:
    """Mail that this process parses."""

    claim: ClaimedRun
    lease: RunLease
    begun_at: float = field(default_factory=time.monotonic)
    task: asyncio.Task[None] = field(init=False)
    is_asked_to_end: bool = False
    is_over: bool = False
    """Its result is not needed any more."""
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
        """Make the parsing thread end at its next attachment, and cancel the one that is being stored."""
        self.is_over = True
        if self.putting is not None:
            self.putting.cancel()


class MailParser:
    """Parser of inbound mail in one process."""

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
        """Create a parser; it calls `on_left` for ended runs with completion actions."""
        self._database = database
        self._store = store
        self._broker = broker
        self._blobs = blobs
        self._sources = sources
        self._settings = settings
        self._on_left = on_left
        # Not the owner of the executor, which releases runs that it doesn't know.
        self._owner = f"{broker.channel}.reader"
        self._leases = LeaseKeeper(
            store, settings.lease_seconds, on_lost=self._on_lease_lost, on_request=self._on_request
        )
        self._threads = ThreadPoolExecutor(
            PARSER_THREADS,
            thread_name_prefix="mail-parsing",
            initializer=lambda: sys.setswitchinterval(offload.SWITCH_SECONDS),
        )
        self._large = asyncio.Semaphore(MAX_LARGE_MAILS)
        self._finishing: GroupCommit[MailParseResult, MailRunState | None] = GroupCommit(self._hand_off)
        self._parse_tasks: dict[str, MailParseTask] = {}
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._isolation = isolation
        self._isolation.join(self._is_proven)
        self._is_claiming = False
        self._suspects = SuspectSearch(store, settings, UNPARSED_TARGET)
        self._wakeup = asyncio.Event()
        self._is_draining = False
        self._after_organization = ""
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to claim and parse unparsed mails: at wakeups, and at every sweep."""
        self._leases.start()
        self._broker.start_mail_parser(self._wakeup.set)
        self._serving = asyncio.create_task(self._parse_forever())
        self._wakeup.set()

    async def close(self) -> None:
        """Claim no more mails, wait up to two seconds for those in progress, and release the others for
        another worker.
        """
        self._is_draining = True
        await self._broker.stop_mail_parser()
        if self._serving is not None:
            self._wakeup.set()
            await asyncio.wait([self._serving], timeout=CLOSE_SECONDS)
            self._serving.cancel()
        if self._parse_tasks:
            await asyncio.wait([one.task for one in self._parse_tasks.values()], timeout=CLOSE_SECONDS)
        for parse_task in list(self._parse_tasks.values()):
            parse_task.task.cancel()
        tasks = [*(one.task for one in self._parse_tasks.values()), *self._side_tasks]
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._finishing.drain()
        self._leases.stop()
        with suppress(DatabaseUnavailable):
            await self._store.release(self._owner, [])
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ── claiming ────────────────────────────────────────────────────────────────────────────────────────────

    async def _parse_forever(self) -> None:
        """Claim mails at each wakeup, and periodically, until the parser drains; errors are logged."""
        while not self._is_draining:
            # Randomized, so that parsers that were started together don't query at the same time.
            seconds = self._settings.sweep_seconds * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wakeup.wait()
            self._wakeup.clear()
            try:
                await self._try_suspects()
                await self._claim()
            except DatabaseUnavailable as error:
                log.warning("database not reached", duty="parse mails", error=str(error))
                await asyncio.sleep(PAUSE_SECONDS)
            except Exception:
                log.exception("duty failed", duty="parse mails")
                await asyncio.sleep(PAUSE_SECONDS)

    def _is_proven(self) -> bool:
        """Return whether no claim is in progress, and the parsing of every claimed mail began over five seconds ago, so
        that all of them count as harmless.
        """
        return not self._is_claiming and all(
            time.monotonic() - parse_task.begun_at >= TRIAL_SECONDS
            for parse_task in self._parse_tasks.values()
        )

    async def _try_suspects(self) -> None:
        """Parse one suspect (a mail that lost several workers) apart from all other work of the process, if a
        search is due.

        A mail that is parsed for five seconds has passed its trial. Raises `DatabaseUnavailable`.
        """
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
            for parse_task in await self._claim_batch(claim):
                log.info(
                    "suspect on trial",
                    execution_id=parse_task.claim.execution_id,
                    attempt=parse_task.claim.attempt,
                )
                await asyncio.wait([parse_task.task], timeout=TRIAL_SECONDS)
                if not parse_task.task.done():
                    await self._store_end(parse_task, has_passed=True)

    async def _claim(self) -> None:
        """Claim as many unparsed mails as this process has room for, after a trial in progress, and begin to parse
        them.

        Raises `DatabaseUnavailable`.
        """
        await self._isolation.pass_gate()
        places = MAX_CLAIMED_MAILS - len(self._parse_tasks)
        if self._is_draining or places <= 0:
            return  # each finished mail triggers another claim
        claim = ClaimQuery(
            self._owner,
            self._settings.lease_seconds,
            places,
            after_organization=self._after_organization,
            target=UNPARSED_TARGET,
        )
        self._is_claiming = True
        try:
            claimed_tasks = await self._claim_batch(claim)
        finally:
            self._is_claiming = False
        if claimed_tasks:
            self._after_organization = claimed_tasks[-1].claim.organization_id
            self._wakeup.set()

    async def _claim_batch(self, claim: ClaimQuery) -> Sequence[MailParseTask]:
        """Claim mails and start a task for each; return the tasks.

        Raises `DatabaseUnavailable`, after a release of mails whose claim was committed without an answer.
        """
        since = time.monotonic()
        try:
            claimed = await self._store.claim(claim)
        except DatabaseUnavailable:
            # The claim may have been committed although its response was lost.
            await self._store.release(self._owner, self._leases.execution_ids())
            raise
        claimed_tasks: list[MailParseTask] = []
        for one in claimed:
            key = ExecutionKey(one.execution_id, one.shard)
            parse_task = MailParseTask(one, self._leases.hold(key, one.token, since))
            self._parse_tasks[one.execution_id] = parse_task
            parse_task.task = asyncio.create_task(self._parse_and_finish(parse_task))
            if one.request is not None:
                self._on_request(parse_task.lease, one.request)
            claimed_tasks.append(parse_task)
        return claimed_tasks

    # ── parsing ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _parse_and_finish(self, parse_task: MailParseTask) -> None:
        """Parse one mail and finish its run; outages are logged.

        After any exception the lease is not renewed: its end counts as an attempt.
        """
        try:
            await self._parse_claimed(parse_task)
        except asyncio.CancelledError:
            parse_task.give_up()
            raise
        except (DatabaseUnavailable, BrokerUnavailable) as error:
            log.warning("mail not finished", execution_id=parse_task.claim.execution_id, error=str(error))
        except Exception:
            log.exception("mail parsing failed", execution_id=parse_task.claim.execution_id)
        finally:
            self._leases.release(parse_task.lease)
            if self._parse_tasks.get(parse_task.claim.execution_id) is parse_task:
                del self._parse_tasks[parse_task.claim.execution_id]
            self._wakeup.set()

    async def _parse_claimed(self, parse_task: MailParseTask) -> None:
        """Parse a claimed mail and let its run be executed.

        A rejected mail ends it as canceled, an invalid one as failed; if the mail can't be read now, it is
        postponed. Raises `DatabaseUnavailable` and `BrokerUnavailable`.
        """
        try:
            parsed = await self._parse(parse_task)
            if (refusal := await self._rejection_reason(parse_task, parsed)) is not None:
                await self._end(parse_task, RunStatus.CANCELLED, refusal)
                return
        except InvalidMail as error:
            await self._end(
                parse_task,
                RunStatus.FAILED,
                RunError(INVALID_INPUT_CODE, f"The mail can't be read: {error.message}"),
            )
            return
        except MailUnavailable as error:
            await self._postpone(parse_task, str(error))
            return
        one = parse_task.claim
        left = await self._finishing.submit(
            MailParseResult(
                parse_task.key, one.token, self._owner, one.workflow_id, parsed.trigger, parsed.text
            )
        )
        if left is None:
            log.warning("mail abandoned", execution_id=one.execution_id, reason="lease lost")
            return
        log.info("mail parsed", execution_id=one.execution_id, workflow_id=one.workflow_id)
        await self._notify_next(parse_task, left)

    async def _parse(self, parse_task: MailParseTask) -> ParsedMail:
        """Read and parse a claimed mail in a thread; return it with its trigger output.

        Two large mails are parsed at a time. Raises `InvalidMail`, and `MailUnavailable` if a retry may help.
        """
        try:
            found = UnparsedMail.from_text(parse_task.claim.trigger)
        except msgspec.DecodeError as error:
            raise InvalidMail("its stored row is not readable") from error
        async with AsyncExitStack() as stack:
            if found.blob is not None or found.stored is not None:
                await stack.enter_async_context(self._large)
            contents = [await self._read_content(parse_task, found)]
            loop = asyncio.get_running_loop()
            work = partial(self._parse_in_thread, parse_task, found, contents, loop)
            try:
                return await loop.run_in_executor(self._threads, work)
            except BlobsUnavailable as error:
                raise MailUnavailable(str(error)) from error

    async def _read_content(self, parse_task: MailParseTask, found: UnparsedMail) -> bytes:
        """Return the raw mail from its row, blob or bucket, at most 50 MB.

        Raises `InvalidMail` for a lost or too large one, and `MailUnavailable` if a retry may help, also for
        a missing object or permission.
        """
        if found.blob is not None:
            return await self._read_blob(parse_task.owner, found.blob.sha256)
        if found.stored is None:
            return found.content
        try:
            bucket = await self._sources.data_sources.bucket(parse_task.caller, found.stored.source_id)
            return await bucket.get(found.stored.key, max_bytes=MAX_MAIL_BYTES, timeout_seconds=FETCH_SECONDS)
        except NodeError as error:
            if error.code == "object-too-large":
                raise InvalidMail(error.message) from error
            # The object may appear a little later, and permissions and secrets may be corrected.
            raise MailUnavailable(error.message) from error

    async def _read_blob(self, owner: BlobOwner, digest: str) -> bytes:
        """Return a blob with one copy in memory; joining its chunks would take two.

        Raises `InvalidMail` if it is lost, and `MailUnavailable` if the storage does not answer within a
        minute.
        """
        written = BytesIO()
        try:
            async with asyncio.timeout(FETCH_SECONDS), self._blobs.open(owner, digest) as opened:
                async for chunk in opened.chunks:
                    written.write(chunk)
        except BlobLost as error:
            raise InvalidMail("its stored content is lost") from error
        except (BlobsUnavailable, TimeoutError) as error:
            raise MailUnavailable("The blob storage does not answer") from error
        return written.getvalue()

    def _parse_in_thread(
        self,
        parse_task: MailParseTask,
        found: UnparsedMail,
        contents: list[bytes],
        loop: asyncio.AbstractEventLoop,
    ) -> ParsedMail:
        """Return a mail parsed in this thread, which waits for each attachment to be stored before it decodes
        the next.

        Raises `MailUnavailable` and `BlobsUnavailable`, and `InvalidMail` for any other exception of a parser
        but lack of memory, since another attempt would fail the same way.
        """
        references: list[dict[str, Any]] = []
        try:
            mail, received = found.parse(contents, self._attachment_keeper(parse_task, references, loop))
            trigger = service_forms.build_trigger_output(mail, received, references)
            return ParsedMail(mail, received, found.screening, trigger, _encode(trigger).decode())
        except AttachmentNotStored as error:
            raise error.__cause__ or error from None
        except (InvalidMail, MailUnavailable, MemoryError):
            raise
        except Exception as error:
            log.exception("mail parser failed", execution_id=parse_task.claim.execution_id)
            raise InvalidMail(
                f"parsing it raised {type(error).__name__}; redrive its delivery once the server is updated"
            ) from error

    def _attachment_keeper(
        self, parse_task: MailParseTask, references: list[dict[str, Any]], loop: asyncio.AbstractEventLoop
    ) -> KeepAttachment:
        """Return a function that stores an attachment as a blob and appends its reference to `references`.

        It is called in the parsing thread, and waits for the storage on `loop`. It raises
        `AttachmentNotStored`, and `MailUnavailable` once the mail is not needed any more.
        """

        def keep(label: AttachmentLabel, pieces: Iterator[bytes]) -> None:
            put = self._blobs.put(
                parse_task.owner,
                mail_content.join_pieces(pieces),
                media_type=label.media_type,
                name=label.filename,
            )
            if parse_task.is_over:
                put.close()
                raise MailUnavailable("The mail is not needed any more")
            parse_task.putting = asyncio.run_coroutine_threadsafe(put, loop)
            try:
                reference = parse_task.putting.result()
            except Exception as error:
                raise AttachmentNotStored from error
            references.append(reference.as_json())

        return keep

    async def _rejection_reason(self, parse_task: MailParseTask, parsed: ParsedMail) -> RunError | None:
        """Return the error of a mail that must not run: rejected by the rules of its trigger, automatic, or
        in a mail loop.

        Else None. Counts a reply to a workflow's mail. Raises `MailUnavailable`.
        """
        if parsed.screening is not None:
            if (rejected := parsed.screening.rejection_reason(parsed.received)) is not None:
                return RunError(MAIL_REJECTED_CODE, rejected)
            if not parsed.screening.accept_automatic and mail_parsing.is_automatic(parsed.mail):
                kinds = "an automatic reply, a bounce or a receipt"
                return RunError(
                    MAIL_LOOP_CODE, f"The mail is {kinds}; `acceptAutomatic` on the trigger runs those too"
                )
        reason = await self._loop_reason(parse_task, parsed.mail)
        return None if reason is None else RunError(MAIL_LOOP_CODE, reason)

    async def _loop_reason(self, parse_task: MailParseTask, mail: ParsedMailContent) -> str | None:
        """Return the reason why a reply may be part of a mail loop, or None.

        One sender may send a workflow ten replies an hour; each reply within the limit counts. Mails that are
        no replies give None. Waits while the database is away. Raises `MailUnavailable`.
        """
        if not mail_parsing.is_reply_to_workflow(mail):
            return None
        sender = ",".join(headers.bare_addresses(mail.from_)).lower()
        digest = sha256(sender.encode()).hexdigest()[:32]
        try:
            await self._sources.throttle.reserve(
                parse_task.caller,
                f"mails:{parse_task.claim.workflow_id}:{digest}",
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

    # ── finishing ───────────────────────────────────────────────────────────────────────────────────────────

    async def _hand_off(self, batch: Sequence[MailParseResult]) -> Sequence[MailRunState | None]:
        return await self._database.transaction(partial(unparsed_mail.release_parsed, batch=batch))

    async def _notify_next(self, parse_task: MailParseTask, left: MailRunState) -> None:
        """Wake the workers or pods that execute a run after its mail was parsed, or publish its end.

        If it fails, a sweep does it. Raises `DatabaseUnavailable` and `BrokerUnavailable`.
        """
        if left.status in TERMINAL_STATUSES:
            status = RunStatus(left.status.value)
            await self._on_ended(parse_task, RunOutcome(status, left.error), left.channel)
        elif left.concurrency_key is not None:
            if await concurrency_limits.admit_waiting_runs(self._database, left.concurrency_key):
                await wakeups.wake_workers(self._broker)
        elif left.assigned_deployment_id is not None:
            await due_runs.wake_due_deployments(self._database, self._broker)
        else:
            await wakeups.wake_workers(self._broker)

    async def _end(self, parse_task: MailParseTask, status: RunStatus, error: RunError) -> None:
        """End the run of a mail with an error, store a rejection in its delivery, and publish the end, unless the lease
        was lost.

        Raises `DatabaseUnavailable`.
        """
        if not await self._store_end(parse_task, end=status, error=error):
            return
        if error.code in {MAIL_LOOP_CODE, MAIL_REJECTED_CODE}:
            reason = f"{error.code}: {error.message}"
            await self._database.transaction(
                partial(unparsed_mail.note_rejection, key=parse_task.key, reason=reason)
            )
        await self._on_ended(parse_task, RunOutcome(status, error), parse_task.claim.channel)

    async def _postpone(self, parse_task: MailParseTask, reason: str) -> None:
        """Let a mail wait half as long as it has waited, from 5 seconds to 15 minutes; after a day its run fails.

        Raises `DatabaseUnavailable`.
        """
        now = self._store.clock.now()
        age = now - parse_task.claim.started_at
        if age > MAX_RETRY_TIME:
            message = f"The mail could not be read for a day: {reason}"
            await self._end(parse_task, RunStatus.FAILED, RunError(INVALID_INPUT_CODE, message))
            return
        log.warning("mail postponed", execution_id=parse_task.claim.execution_id, reason=reason)
        due_at = now + min(max(age / 2, FIRST_RETRY), LAST_RETRY)
        await self._store_end(
            parse_task,
            end=RunStatus.WAITING,
            due_at=due_at,
            wait_answer_count=parse_task.claim.wait_answer_count,
        )

    async def _store_end(self, parse_task: MailParseTask, **fields: Any) -> bool:  # noqa: ANN401 - fields of any type
        """Store the end of a claim with these fields of `RunWrite`; return False if its lease was lost.

        Raises `DatabaseUnavailable`.
        """
        one = parse_task.claim
        write = RunWrite(one.execution_id, one.shard, one.token, **fields)
        return one.execution_id in await self._store.record([write], owner=self._owner)

    async def _on_ended(self, parse_task: MailParseTask, ended: RunOutcome, channel: str) -> None:
        """Log that a mail ended its run, perform its completion actions, and notify the gateway."""
        one = parse_task.claim
        log.info(
            "mail not run",
            status=ended.status.value,
            execution_id=one.execution_id,
            workflow_id=one.workflow_id,
            error=ended.error.code if ended.error else None,
        )
        if one.completion_action is not None:
            self._on_left(one, ended)
        with suppress(BrokerUnavailable):
            await self._broker.publish({one.execution_id: channel})

    # ── leases and requests ─────────────────────────────────────────────────────────────────────────────────

    def _on_lease_lost(self, lease: RunLease) -> None:
        parse_task = self._task_of(lease)
        if parse_task is not None:
            parse_task.task.cancel()

    def _on_request(self, lease: RunLease, _request: str) -> None:
        parse_task = self._task_of(lease)
        if parse_task is not None and not parse_task.is_asked_to_end:
            parse_task.is_asked_to_end = True
            self._in_background(partial(self._release, parse_task))

    async def _release(self, parse_task: MailParseTask) -> None:
        """Stop the parsing of a mail whose run a client has asked to end, and release the run, which ends it;
        publish that.

        Raises `DatabaseUnavailable`.
        """
        parse_task.task.cancel()
        await asyncio.wait([parse_task.task])
        if await self._store_end(parse_task, end=RunStatus.RELEASED):
            with suppress(BrokerUnavailable):
                await self._broker.publish({parse_task.claim.execution_id: parse_task.claim.channel})

    def _task_of(self, lease: RunLease) -> MailParseTask | None:
        parse_task = self._parse_tasks.get(lease.key.execution_id)
        return parse_task if parse_task is not None and parse_task.lease is lease else None

    def _in_background(self, work: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(self._suppress_outages(work))
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)

    async def _suppress_outages(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do work and log its exceptions instead of raising them; the end of the lease has the same effect."""
        try:
            await work()
        except (BrokerUnavailable, DatabaseUnavailable) as error:
            log.debug("request not handled", error=str(error))
        except Exception:
            log.exception("request not handled")
