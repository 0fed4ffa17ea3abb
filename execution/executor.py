"""Executor that claims pending runs and runs them concurrently on the event loop of the process."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import structlog
from msgspec import Struct, field

from engine.run_errors import InvalidDefinition, LeaseLost
from engine.run_records import SETTLED_STATUSES, NodeSpan, RunError, RunOutcome, RunStatus
from engine.services import ControlRequest, RunCaller, RunControl
from engine.values import InvalidJson
from engine.workflow_runner import RunStart, run_workflow
from execution import run_metrics, run_traces
from execution.direct_slots import DirectSlots
from execution.program_cache import ProgramCache, definition_key
from execution.trials import POLL_SECONDS, TRIAL_SECONDS, SuspectSearch, TrialGate
from journal.blobs.blob_storage import BlobOwner
from journal.blobs.large_values import LargeValues, RecordedValueLost
from journal.recorder import LeaseKeeper, RunJournal, RunLease, RunRecorder
from journal.store import DIRECT_LEASE_SECONDS, ClaimedRun, ClaimQuery, DefinitionKey, ExecutionKey
from messages import wakeups
from messages.broker import GRANT_SECONDS, NO_GRANTS, BrokerUnavailable, DirectMessage, Notification
from models.errors import DatabaseUnavailable
from models.ids import turn_of_workflow
from telemetry import log_context, run_origin, tracing

if TYPE_CHECKING:
    from engine.agents.agent_steps import AgentStep
    from engine.program import WorkflowProgram
    from engine.services import NodeServices
    from execution.settings import ExecutionSettings
    from journal.blobs.blob_store import RunBlobs
    from journal.store import RunStore
    from messages.broker import DirectRuns, RunBroker
    from models.ended_execution import EndedExecution
    from nodes.catalog import NodeCatalog

log = structlog.get_logger()

MAX_CLAIM = 50
MAX_EXTRA_CLAIM = 5
"""Maximum claim for organizations without a run in this process while all its slots are taken."""
SWEEP_ROWS = 100
MAX_TIMER_SECONDS = 3600.0
"""Longest timer in this process; the sweep finds runs that wait longer."""
TIMER_MARGIN_SECONDS = 0.01
"""Delay that allows for a timer that fires early."""
MAX_CACHED_TURNS = 1_000
"""Number of organizations, the last ones served, whose next workflow turn is remembered."""
MAX_DIRECT_AGE_SECONDS = 2.0
"""Age at which assigned runs are too late to begin under their first lease."""
CLAIM_SECONDS = 2.0
HAND_OFF_SECONDS = 10.0
CANCEL_SECONDS = 5.0
RECORD_SECONDS = 2.0
PAUSE_SECONDS = 0.5
UNKNOWN_STATUS = "unknown"
"""Status in traces of a claim that ended by an unexpected exception or a cancellation."""
ReadAnswers = Callable[[Sequence[ExecutionKey]], Awaitable[dict[str, dict[tuple[str, str], bytes]]]]
"""Returns the wait answers of runs, by execution id, then by node id and iteration."""

REQUESTS = {"stop": ControlRequest.STOP, "cancel": ControlRequest.CANCEL}
"""Control requests by their name in rows and direct messages."""


class RunningExecution(msgspec.Struct, frozen=True):
    """Run that this process holds."""

    organization_id: str
    lease: RunLease
    control: RunControl
    journal: RunJournal
    task: asyncio.Task[None]
    begun_at: float
    """Time by the monotonic clock."""

    def is_proven(self) -> bool:
        """Return whether the run counts as harmless to its process.

        It has committed a new result since its claim, or has run for five seconds.
        """
        return self.journal.has_new_result or time.monotonic() - self.begun_at >= TRIAL_SECONDS


class RecoveredState(Struct, frozen=True):
    """Journal of the earlier attempts at a run."""

    spans: Sequence[NodeSpan] = ()
    steps: Sequence[AgentStep] = ()
    """Steps of agents that have not ended."""
    last_sequence: int = 0
    """Number of the last span, step or log line; they share one sequence."""
    wait_answers: Mapping[tuple[str, str], bytes] = field(default_factory=dict)
    """Wait answers of nodes, by node id and iteration."""


class ExecutorHooks(Struct, frozen=True):
    """Optional callbacks of the process that hosts an executor."""

    answers: ReadAnswers | None = None
    """Reads the wait answers of nodes; without it, nodes get none."""
    on_left: Callable[[ClaimedRun, RunOutcome], None] | None = None
    """Called when a run with completion actions or a concurrency slot has left the executor."""
    on_swept: Callable[[], Awaitable[None]] | None = None
    """Called after each sweep."""
    log_levels: Mapping[str, str] = field(default_factory=dict)
    """Log levels by workflow, as they are now."""


class RunExecutor:
    """Executor of one process: claims runs, executes them, and releases them."""

    def __init__(
        self,
        store: RunStore,
        broker: RunBroker,
        catalog: NodeCatalog,
        services: NodeServices,
        settings: ExecutionSettings,
        *,
        blobs: RunBlobs | None = None,
        hooks: ExecutorHooks | None = None,
        isolation: TrialGate | None = None,
    ) -> None:
        """Without `blobs`, rows hold inputs and outputs of any size.

        All executors of one process share one `isolation`.
        """
        self._store = store
        self._hooks = hooks or ExecutorHooks()
        self._blobs = blobs
        self._broker = broker
        self._services = services
        self._settings = settings
        self._limits = settings.limits
        run_metrics.workflow_labels.allow(settings.metrics_workflows)
        self._programs = ProgramCache(store, catalog)
        self._recorder = RunRecorder(store, self._publish)
        self._leases = LeaseKeeper(
            store, settings.lease_seconds, on_lost=self._on_lease_lost, on_request=self._on_request
        )
        self._active: dict[str, RunningExecution] = {}
        self._side_tasks: set[asyncio.Task[None]] = set()
        self._isolation = isolation or TrialGate()
        self._isolation.join(self._is_proven)
        self._claims_in_progress = 0
        self._has_claimed = False
        self._is_behind = True
        """Whether runs may wait to be claimed for want of a slot here."""
        self._grants_slots = settings.grants_slots
        self._slots = DirectSlots(broker.channel)
        self._suspects = SuspectSearch(store, settings)
        self._wanted = asyncio.Event()
        self._owes_claim = False
        self._is_draining = False
        self._after_organization = ""
        self._turns: OrderedDict[str, int] = OrderedDict()
        self._loops: list[asyncio.Task[None]] = []

    async def prepare(self, key: DefinitionKey, definition: str) -> None:
        """Compile and cache a definition before a run needs it; an invalid one is cached as its error.

        A pod does so with its definition at its start.
        """
        await self._programs.prepare(key, definition)

    async def start(self) -> None:
        """Start to claim and execute runs: the loops for claims, sweeps and commits, lease renewals, and wakeups."""
        self._leases.start()
        await self._broker.listen(self._on_notification)
        self._broker.start_worker(self.wake)
        if self._grants_slots:
            self._broker.receive_direct(self._on_direct)
        self._loops = [
            asyncio.create_task(self._repeat_until_draining(self._claim, "claim")),
            asyncio.create_task(self._repeat_until_draining(self._sweep, "sweep")),
            asyncio.create_task(self._repeat_forever(self._commit_dirty, "commit")),
            asyncio.create_task(self._repeat_until_draining(self._renew_grants, "grants")),
        ]
        self.wake()

    def wake(self, _shard: int = 0) -> None:
        """Let the claim loop claim runs as soon as a slot is free, because some may be pending. The shard is
        ignored.
        """
        self._owes_claim = True
        self._wanted.set()

    def count_held_runs(self) -> int:
        """Return the number of runs that this process holds."""
        return len(self._active)

    async def drain(self, *, patience_seconds: float = 0) -> None:
        """Stop claiming, let runs finish for `patience_seconds`, then hand off the others to other processes.

        They are handed off at the boundary of a node within ten seconds if possible; then their nodes are
        interrupted. At the end all leases are released, and other workers are woken; a node that can't be interrupted
        goes on without a lease. The executor can't be started again.
        """
        self._is_draining = True
        self._wanted.set()
        await self._suppress_outages(self._send_grants)  # of no slots
        await self._broker.stop_worker()
        # Wait for a claim in progress: if cancelled, it might leave leased runs that no process executes.
        await asyncio.wait(self._loops[:1], timeout=CLAIM_SECONDS)
        if self._grants_slots:
            await self._suppress_outages(self._release_unheld)  # assigned runs that have not arrived
        await self._wait_for_runs(patience_seconds)
        await self._hand_off(ControlRequest.HAND_OFF, HAND_OFF_SECONDS)
        await self._hand_off(ControlRequest.HAND_OFF_NOW, CANCEL_SECONDS)
        for loop in self._loops:
            loop.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECORD_SECONDS):
                await self._recorder.drain()
        self._leases.stop()
        if self._active:
            # A node that can't be interrupted keeps its run. That is no loss, and no lease needs to expire.
            with contextlib.suppress(DatabaseUnavailable):
                await self._store.release(self._broker.channel, [])
        await wakeups.wake_workers(self._broker)

    async def _hand_off(self, request: ControlRequest, seconds: float) -> None:
        """Ask all held runs to be handed off, and wait for it up to `seconds`."""
        for active in self._active.values():
            active.control.ask(request)
        await self._wait_for_runs(seconds)

    async def _wait_for_runs(self, seconds: float) -> None:
        """Wait up to `seconds` until no run is held."""
        if seconds and (tasks := [active.task for active in self._active.values()]):
            await asyncio.wait(tasks, timeout=seconds)

    # ── claiming ──────────────────────────────────────────────────────────────────────────────────

    async def _claim(self) -> None:
        """Wait for a wakeup, then claim as many runs as there are free slots, and begin them.

        A search for suspects (runs that lost several workers) comes before the first claim; later ones run in
        the background when they are due. It claims nothing while draining. Raises `DatabaseUnavailable`.
        """
        await self._wanted.wait()
        self._wanted.clear()
        if self._is_draining:
            return
        if not self._has_claimed:
            self._has_claimed = True
            await self._suppress_outages(
                self._try_suspects
            )  # nothing else is held yet, so no run has to wait for the trials
        elif self._suspects.is_due and self._isolation.is_open:
            self._in_background(self._try_suspects)  # new runs don't wait for the search
        await self._isolation.pass_gate()
        limit, excluded_organizations = self._free_slots()
        if limit <= 0 or self._is_draining:
            self._is_behind = True
            return  # the end of a run triggers the owed claim
        self._owes_claim = bool(excluded_organizations)
        since = time.monotonic()
        claim = ClaimQuery(
            self._broker.channel,
            self._settings.lease_seconds,
            limit,
            self._after_organization,
            self._turns,
            excluded_organizations=excluded_organizations,
        )
        self._claims_in_progress += 1
        try:
            claimed = await self._claim_and_begin(claim, since)
        finally:
            self._claims_in_progress -= 1
        is_used_up = len(claimed) == limit or any(run.may_have_more for run in claimed)
        self._is_behind = is_used_up or bool(excluded_organizations)

    async def _claim_and_begin(self, claim: ClaimQuery, since: float) -> Sequence[ClaimedRun]:
        """Claim runs, hold their leases and begin them; return the runs.

        `since` is the time before the claim, by the monotonic clock. While draining, claimed runs are
        released again. If more may be pending, this and other workers are woken. Raises
        `DatabaseUnavailable`, after runs that could not begin are released.
        """
        try:
            claimed = await self._store.claim(claim)
        except DatabaseUnavailable:
            await self._release_unheld()
            raise
        if not claimed:
            return ()
        if self._is_draining:
            await self._release_unheld()
            return ()
        run_metrics.count_claims(claimed, self._broker.channel)
        if self._grants_slots:
            self._slots.remember_gateways(claimed)
        if not claim.is_trial:
            self._remember_turns(claimed)
        leases = [self._leases.hold(ExecutionKey(c.execution_id, c.shard), c.token, since) for c in claimed]
        if any(run.may_have_more for run in claimed):
            self.wake()
            await wakeups.wake_workers(self._broker)
        await self._begin_or_release(claimed, leases)
        return claimed

    async def _begin_or_release(self, claimed: Sequence[ClaimedRun], leases: Sequence[RunLease]) -> None:
        """Begin runs; if the database can't be read meanwhile, make them pending again and raise
        `DatabaseUnavailable`.

        After any other error each is begun alone, so that one can't prevent the others.
        """
        try:
            await self._begin(claimed, leases)
        except DatabaseUnavailable:
            for lease in leases:
                self._leases.release(lease)
            await self._release_unheld()
            raise
        except Exception:
            log.exception("claimed runs not started together", runs=len(claimed))
            await self._begin_each_alone(claimed, leases)

    def _free_slots(self) -> tuple[int, Sequence[str]]:
        """Return the number of runs to claim, at most 50, and the organizations to exclude from the claim.

        If all slots are taken, organizations without a run here may still claim up to five more in total.
        Otherwise they would wait for others, whose runs may last arbitrarily long.
        """
        left = self._settings.concurrency - len(self._active)
        if left > 0:
            return min(left, MAX_CLAIM), ()
        served = {active.organization_id for active in self._active.values()}
        return min(left + self._settings.concurrency, MAX_EXTRA_CLAIM), sorted(served)

    async def _begin_each_alone(self, claimed: Sequence[ClaimedRun], leases: Sequence[RunLease]) -> None:
        """Begin runs one by one; a run that fails to begin is logged, and its lease expires, which counts as an
        attempt.
        """
        for run, lease in zip(claimed, leases, strict=True):
            try:
                await self._begin([run], [lease])
            except Exception:
                # As with a run that breaks: its lease expires, and the attempt is counted.
                log.exception("run not started", execution_id=run.execution_id)
                self._leases.release(lease)

    def _remember_turns(self, claimed: Sequence[ClaimedRun]) -> None:
        """Remember organization and workflow turn of the last claimed runs, so that the next claim continues
        behind them.
        """
        self._after_organization = claimed[-1].organization_id
        for run in claimed:
            self._turns[run.organization_id] = turn_of_workflow(run.workflow_id) + 1
            self._turns.move_to_end(run.organization_id)
        while len(self._turns) > MAX_CACHED_TURNS:
            self._turns.popitem(last=False)

    async def _release_unheld(self) -> None:
        """Release runs that the database assigns to this process and it does not hold, since a claim's answer
        may be lost.

        Raises `DatabaseUnavailable`.
        """
        self.wake()
        await self._store.release(self._broker.channel, self._leases.execution_ids())

    async def _begin(self, claimed: Sequence[ClaimedRun], leases: Sequence[RunLease]) -> None:
        """Load the programs and recorded states of claimed runs, and start a task for each; an earlier stop
        request applies.

        Raises `DatabaseUnavailable`.
        """
        programs = await self._programs.load(claimed)
        recovered_states = await self._recover_states(
            [run for run in claimed if run.has_journal],
            {run.execution_id for run in claimed if _has_agents(programs[definition_key(run)])},
        )
        for run, lease in zip(claimed, leases, strict=True):
            recovered = recovered_states.get(run.execution_id, RecoveredState())
            settled = [
                span.node_id
                for span in recovered.spans
                if span.status in SETTLED_STATUSES and not span.is_iteration and not span.is_tool_wait
            ]
            control = RunControl()
            journal = RunJournal(
                self._recorder,
                lease,
                settled,
                channel=run.channel,
                wait_answer_count=run.wait_answer_count,
                large=self._large_values(run),
                control=control,
                is_new=not run.has_journal,
            )
            journal.organization_id = run.organization_id
            program = programs[definition_key(run)]
            task = asyncio.create_task(self._run(run, program, recovered, journal, control, lease))
            self._active[run.execution_id] = RunningExecution(
                run.organization_id, lease, control, journal, task, time.monotonic()
            )
            if run.request is not None:
                self._on_request(lease, run.request)
        run_metrics.set_held_runs(len(self._active))

    def _large_values(self, run: ClaimedRun) -> LargeValues | None:
        if self._blobs is None:
            return None
        owner = BlobOwner(run.organization_id, run.key_id)
        return LargeValues(self._blobs, owner, self._settings.max_row_output_bytes)

    async def _recover_states(
        self, begun: Sequence[ClaimedRun], with_agents: Collection[str]
    ) -> dict[str, RecoveredState]:
        """Return spans, steps, last sequence number and wait answers of runs as earlier attempts have recorded them, by
        execution id.

        `with_agents` are the runs that may have steps of agents. Raises `DatabaseUnavailable`.
        """
        if not begun:
            return {}
        keys = [ExecutionKey(run.execution_id, run.shard) for run in begun]
        spans = await self._store.spans(keys)
        last_lines = await self._store.last_log_lines(keys)
        stepped = [key for key in keys if key.execution_id in with_agents]
        steps = await self._store.steps(stepped) if stepped else {}
        answers = await self._fetch_answers(
            [key for key, run in zip(keys, begun, strict=True) if run.wait_answer_count]
        )
        return {
            execution_id: RecoveredState(
                spans[execution_id],
                steps.get(execution_id, ()),
                _last_sequence(
                    last_lines.get(execution_id, 0), spans[execution_id], steps.get(execution_id, ())
                ),
                answers.get(execution_id, {}),
            )
            for execution_id, _ in keys
        }

    async def _read_answers(
        self, run: ClaimedRun, journal: RunJournal
    ) -> Mapping[tuple[str, str], bytes] | None:
        """Return the stored wait answers of a run by node id and iteration, and note their number in its journal.

        None, after half a second, if the database is unavailable.
        """
        try:
            answers = await self._fetch_answers([ExecutionKey(run.execution_id, run.shard)])
        except DatabaseUnavailable:
            await asyncio.sleep(PAUSE_SECONDS)
            return None
        found = answers.get(run.execution_id, {})
        journal.set_answer_count(len(found))
        return found

    async def _fetch_answers(
        self, answered: Sequence[ExecutionKey]
    ) -> dict[str, dict[tuple[str, str], bytes]]:
        """Return the wait answers of runs by execution id, then by node id and iteration; none without a hook that
        reads them.

        Raises `DatabaseUnavailable`.
        """
        if not answered or self._hooks.answers is None:
            return {}
        return await self._hooks.answers(answered)

    # ── assigned runs ─────────────────────────────────────────────────────────────────────────────

    def _on_direct(self, message: DirectRuns) -> None:
        """Begin runs that a gateway has assigned to this process; if they come late, or while draining or on
        trial, release them.
        """
        runs = self._slots.receive(message)
        since = self._store.clock.monotonic_of(runs[0].started_at) if runs else 0.0
        is_late = time.monotonic() - since > MAX_DIRECT_AGE_SECONDS
        if is_late or self._is_draining or not self._isolation.is_open:
            self._in_background(self._release_unheld)
            return
        run_metrics.count_claims(runs, self._broker.channel)
        leases = [
            self._leases.hold(
                ExecutionKey(run.execution_id, run.shard), run.token, since, DIRECT_LEASE_SECONDS
            )
            for run in runs
        ]
        self._in_background(partial(self._begin_direct, runs, leases))

    async def _begin_direct(self, runs: Sequence[ClaimedRun], leases: Sequence[RunLease]) -> None:
        """Begin assigned runs as `_begin_or_release` does; meanwhile they count as a claim in progress."""
        self._claims_in_progress += 1
        try:
            await self._begin_or_release(runs, leases)
        finally:
            self._claims_in_progress -= 1

    def _may_hold_waiting_run(self) -> bool:
        """Return whether a run may stay here while it waits for a new task: over half of the slots are free, and
        no other run waits for a slot.
        """
        return (
            self._settings.holds_waiting_runs
            and not self._is_draining
            and not self._is_behind
            and self._isolation.is_open
            and 2 * len(self._active) < self._settings.concurrency
        )

    def _count_free_slots(self) -> int:
        """Return the number of slots that gateways may fill; 0 while runs wait to be claimed, on trial, and while
        draining.

        It is negative if more runs are held than there are slots.
        """
        if self._is_behind or self._is_draining or not self._grants_slots or not self._isolation.is_open:
            return 0
        return self._settings.concurrency - len(self._active)

    async def _renew_grants(self) -> None:
        """Wait for half of the time for which grants hold, then send new grants of free slots to gateways once."""
        await asyncio.sleep(GRANT_SECONDS / 2)
        await self._suppress_outages(self._send_grants)

    async def _send_grants(self) -> None:
        """Grant an equal share of the slots that are free now to each known gateway, in place of its earlier grant; 0
        if none is free.

        Raises `BrokerUnavailable`.
        """
        if grants := self._slots.grant(self._count_free_slots()):
            await self._broker.publish({}, (), grants)

    # ── trials ────────────────────────────────────────────────────────────────────────────────────

    def _is_proven(self) -> bool:
        """Return whether all runs here are proven harmless to the process and no claim is in progress."""
        return not self._claims_in_progress and all(active.is_proven() for active in self._active.values())

    async def _try_suspects(self) -> None:
        """Search for suspects if that is due, and run those found one after another while other claims wait.

        Suspects are runs that lost several workers. One period of trials takes five seconds, and as long as
        its last trial. Raises `DatabaseUnavailable`.
        """
        max_isolation_losses = await self._suspects.find()
        if max_isolation_losses is None:
            return
        async with self._isolation.run_trial():
            until = time.monotonic() + TRIAL_SECONDS
            while not self._is_draining and (since := time.monotonic()) < until:
                claim = ClaimQuery(
                    self._broker.channel,
                    self._settings.lease_seconds,
                    limit=1,
                    is_trial=True,
                    max_isolation_losses=max_isolation_losses,
                )
                claimed = await self._claim_and_begin(claim, since)
                if not claimed:
                    break
                await self._watch_trial(claimed[0])
        self._suspects.pause()

    async def _watch_trial(self, run: ClaimedRun) -> None:
        """Wait until a suspect is proven harmless or has left this process, and commit its results meanwhile.

        A run that is proven by time alone is recorded as such.
        """
        log.info("suspect on trial", execution_id=run.execution_id, attempt=run.attempt)
        active = self._active.get(run.execution_id)
        while active is not None and not active.is_proven() and not active.task.done():
            await asyncio.wait([active.task], timeout=POLL_SECONDS)
            if active.journal.owes_result and not active.journal.is_committing:
                await self._suppress_outages(
                    active.journal.commit
                )  # other claims wait for it, and it may kill the worker at any moment
        if active is not None and not active.task.done() and not active.journal.has_new_result:
            await self._suppress_outages(active.journal.pass_trial)

    # ── running ───────────────────────────────────────────────────────────────────────────────────

    async def _run(
        self,
        run: ClaimedRun,
        program: WorkflowProgram | InvalidDefinition,
        recovered: RecoveredState,
        journal: RunJournal,
        control: RunControl,
        lease: RunLease,
    ) -> None:
        """Execute a run to its end, its wait or the loss of its lease, and record the outcome with its trace.

        It raises nothing: after an unexpected error the lease expires, and the attempt is counted. At last
        the lease and the slot are released.
        """
        trace: run_traces.SegmentTrace | None = None
        result: tuple[str, str | None] = UNKNOWN_STATUS, UNKNOWN_STATUS
        log_context.fields.set(run_origin.log_fields(run.execution_id, run.trace_origin))
        if tracing.tracer is not None:
            trace = run_traces.begin_segment(tracing.tracer, run, self._store.clock.now())
            journal.on_durable = trace.add_committed
        try:
            outcome = await self._finish(run, program, recovered, journal, control)
            await journal.end(outcome)
        except LeaseLost:
            result = "abandoned", "lease-lost"
            log.warning("run abandoned", execution_id=run.execution_id, reason="lease lost")
        except Exception:
            # The lease expires, and the attempt is counted, so a run that always breaks ends as crashed.
            log.exception("run failed unexpectedly", execution_id=run.execution_id)
        else:
            if trace is not None:
                result = outcome.status.value, run_traces.error_code(outcome.error)
            self._on_ended(run, outcome)
        finally:
            if trace is not None:
                trace.end(self._store.clock.now(), *result)
            self._leases.release(lease)
            if self._running_execution(lease) is not None:
                del self._active[run.execution_id]
            run_metrics.set_held_runs(len(self._active))
            if self._owes_claim:
                self._wanted.set()

    async def _finish(
        self,
        run: ClaimedRun,
        program: WorkflowProgram | InvalidDefinition,
        recovered: RecoveredState,
        journal: RunJournal,
        control: RunControl,
    ) -> RunOutcome:
        """Restore a run's recorded state, run its nodes, and return the outcome.

        An invalid definition, trigger or recorded value fails the run. Raises `LeaseLost`.
        """
        if isinstance(program, InvalidDefinition):
            return RunOutcome(RunStatus.FAILED, error=RunError("invalid-definition", str(program)))
        try:
            trigger = await journal.read_trigger(run.trigger)
            recorded = await journal.restore(recovered.spans)
        except InvalidJson as error:
            return RunOutcome(RunStatus.FAILED, error=RunError("invalid-input", str(error)))
        except RecordedValueLost as error:
            return RunOutcome(RunStatus.FAILED, error=RunError("value-lost", error.message, error.node_id))
        start = RunStart(
            caller=RunCaller(
                *(run.organization_id, run.user_id, run.workflow_id, run.execution_id, run.key_id),
                write_key_id=run.write_key_id,
                is_tainted=run.is_tainted,
            ),
            trigger=trigger,
            clock=self._store.clock,
            deadline=run.deadline_at,
            started_at=run.started_at,
            attempt=run.attempt,
            recorded=recorded,
            steps=recovered.steps,
            sequence=recovered.last_sequence,
            log_level=run.log_level or self._hooks.log_levels.get(run.workflow_id),
            wait_answers=recovered.wait_answers,
            read_wait_answers=partial(self._read_answers, run, journal),
            may_hold=None if run.concurrency_key is not None else self._may_hold_waiting_run,
        )
        return await run_workflow(program, start, journal, control, self._services, self._limits)

    def _on_ended(self, run: ClaimedRun, outcome: RunOutcome) -> None:
        """Count the end of a claim, and call the `on_left` hook for a run with completion actions or a concurrency
        slot.

        A run that waits for less than an hour gets a timer that makes it pending.
        """
        run_metrics.count_end(run, outcome.status, self._store.clock.now())
        on_left = self._hooks.on_left
        if on_left is not None and (run.completion_action is not None or run.concurrency_key is not None):
            on_left(run, outcome)
        if outcome.status is RunStatus.WAITING and outcome.due_at is not None:
            seconds = self._store.clock.seconds_until(outcome.due_at)
            if seconds < MAX_TIMER_SECONDS:
                delay = seconds + TIMER_MARGIN_SECONDS
                asyncio.get_running_loop().call_later(delay, self._in_background, self._promote_due)
        log.info(
            "execution left",
            status=outcome.status.value,
            execution_id=run.execution_id,
            workflow_id=run.workflow_id,
            error=outcome.error.code if outcome.error else None,
        )

    # ── requests and notifications ────────────────────────────────────────────────────────────────────

    def _on_notification(self, notification: Notification) -> None:
        """Pass a request to stop or cancel a run of this process, or the news of an answer, to the run; other
        notifications are ignored.
        """
        if not isinstance(notification, DirectMessage):
            return
        for execution_id in wakeups.parse_answered_runs(notification):
            if (answered := self._active.get(execution_id)) is not None:
                answered.control.announce_answer()
        active = self._active.get(notification.message.get("execution_id", ""))
        if active is not None:
            self._on_request(active.lease, notification.message.get("request", ""))

    def _on_request(self, lease: RunLease, request: str) -> None:
        """Let a held run stop after its nodes in progress, or cancel it at once."""
        active = self._running_execution(lease)
        if active is not None and request in REQUESTS:
            active.control.ask(REQUESTS[request])

    def _on_lease_lost(self, lease: RunLease) -> None:
        """Interrupt a run whose lease is lost; nothing of it is recorded any more."""
        active = self._running_execution(lease)
        if active is not None:
            run_metrics.count_lost_lease()
            active.control.ask(ControlRequest.ABANDON)

    def _running_execution(self, lease: RunLease) -> RunningExecution | None:
        """Return the run that is held under this very lease; None if it has left.

        A lost execution may be back here under another lease.
        """
        active = self._active.get(lease.key.execution_id)
        return active if active is not None and active.lease is lease else None

    def _publish(self, channels: Mapping[str, str], outcomes: Sequence[EndedExecution] = ()) -> None:
        """Publish in the background that runs have changed, and the outcomes of ended ones.

        `channels` has for each ended run the channel of the gateway that accepted it, which also gets a grant of slots;
        an empty one for other runs, and for keys of organizations with changed tasks.
        """
        ended = [channel for channel in channels.values() if channel]
        # The runs that have just ended leave their slots in a moment.
        grants = self._slots.grant(self._count_free_slots() + len(ended), set(ended)) if ended else NO_GRANTS
        self._in_background(lambda: self._broker.publish(channels, outcomes, grants))

    # ── periodic duties ───────────────────────────────────────────────────────────────────────────────

    async def _promote_due(self) -> None:
        if self._is_draining:
            return
        if await self._store.promote_due():
            self.wake()

    async def _sweep(self) -> None:
        """After the interval of sweeps (20 % more or less), reclaim runs of dead workers, then call the hook for
        sweeps.

        It wakes the claim loop if any runs are pending.
        """
        # Jitter, so that workers that started together don't all sweep at once.
        await asyncio.sleep(self._settings.seconds_between_sweeps * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
        while True:
            swept = await self._store.sweep(SWEEP_ROWS)
            if swept.ended:
                self._publish(swept.ended)
            if swept.has_pending:
                self.wake()
            if swept.requeued + len(swept.ended) < SWEEP_ROWS:
                break
        if self._hooks.on_swept is not None:
            await self._hooks.on_swept()

    async def _commit_dirty(self) -> None:
        """After a pause of `commit_seconds`, commit results that runs haven't committed yet, in the background.

        That bounds the reads that a crash repeats.
        """
        await asyncio.sleep(self._settings.commit_seconds)
        for active in list(self._active.values()):
            if active.journal.is_dirty and not active.journal.is_committing:
                self._in_background(active.journal.commit)

    async def _repeat_until_draining(self, duty: Callable[[], Awaitable[None]], name: str) -> None:
        while not self._is_draining:
            await self._attempt(duty, name)

    async def _repeat_forever(self, duty: Callable[[], Awaitable[None]], name: str) -> None:
        while True:
            await self._attempt(duty, name)

    async def _attempt(self, duty: Callable[[], Awaitable[None]], name: str) -> None:
        """Run a duty of a loop once; log any error and pause for half a second after it."""
        try:
            await duty()
        except DatabaseUnavailable as error:
            log.warning("database unavailable", duty=name, error=str(error))
            await asyncio.sleep(PAUSE_SECONDS)
        except Exception:
            log.exception("duty failed", duty=name)
            await asyncio.sleep(PAUSE_SECONDS)

    def _in_background(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do work in a task of its own that this executor keeps until its end."""
        task = asyncio.create_task(self._suppress_outages(work))
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)

    async def _suppress_outages(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do work; outages and lost leases are only logged, other errors with a trace, since the sweep or the
        run repeats it.
        """
        try:
            await work()
        except (BrokerUnavailable, DatabaseUnavailable, LeaseLost) as error:
            log.debug("background work not completed", error=str(error))
        except Exception:
            log.exception("background work failed")


def _has_agents(program: WorkflowProgram | InvalidDefinition) -> bool:
    return not isinstance(program, InvalidDefinition) and program.has_agents


def _last_sequence(last_line: int, spans: Sequence[NodeSpan], steps: Sequence[AgentStep]) -> int:
    """Return the highest recorded sequence number of a run."""
    numbers = [*(span.sequence for span in spans), *(step.sequence for step in steps)]
    return max([last_line, *numbers])
