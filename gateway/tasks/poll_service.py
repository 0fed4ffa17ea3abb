"""Service of the open polls of task workers: one loop for each organization looks, tells and claims for all of them.

So the claims of one gateway never compete for the same tasks. A parked poll costs no query.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog

from gateway.http import errors
from gateway.http.shared_allowance import SharedAllowance
from gateway.tasks.parked_polls import EMPTY_ANSWER, OrganizationPolls, ParkedPoll, PollAnswer
from gateway.tasks.poll_heartbeats import PollHeartbeats
from messages.broker import CHANGED_EXECUTIONS, BrokerUnavailable, ChangedExecutions
from models.errors import DatabaseUnavailable, LockWaitTimeout
from models.task_states import WORKERS_PREFIX, organization_of_key, watch_key, workers_key

if TYPE_CHECKING:
    from journal.tasks.task_polls import Claim, OrganizationNews
    from journal.tasks.task_store import TaskStore
    from messages.broker import Broker, Notification

log = structlog.get_logger()

ClientWatch: TypeAlias = Callable[[Callable[[], None]], None]
"""Function that calls its argument as soon as the client of a poll disconnects."""
MAX_PARKED: Final = 20_000
LOOK_TOGETHER_SECONDS: Final = 0.1
"""Time for which the first look of polls waits for others, while no task waits for them; a new task ends it."""
MANY_POLLS: Final = 100
"""Open polls of an organization from which looks wait for so long, and for a share of it with fewer."""
WATCH_SECONDS: Final = 300.0
"""Time after which a watch is set again; the broker forgets it later."""
REPORTED_SECONDS: Final = 5.0
"""Time after which an open poll tells a worker of a cancellation again."""
LOCKED_PAUSES: Final = (0.05, 0.02, 0.01, 0.005, 0.002)
"""Pauses before repeated claims, the last one first, while other gateways hold all tasks locked."""
MAX_REPORTED: Final = 10_000


class PollService:
    """All open polls of task workers at this gateway."""

    def __init__(self, broker: Broker, tasks: TaskStore) -> None:
        self._broker = broker
        self._tasks = tasks
        self._polls: dict[str, OrganizationPolls] = {}
        """By organization."""
        self.places = SharedAllowance(MAX_PARKED, "Too many workers wait here: try again")
        self._watched: dict[str, float] = {}
        """Times at which watches of organizations were set."""
        self._reported_until: dict[str, float] = {}
        self._heartbeats = PollHeartbeats()
        self._listening: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def organization_ids(self) -> Collection[str]:
        """Ids of the organizations with open polls at this gateway."""
        return list(self._polls)

    def key_ids(self) -> set[str]:
        """Return the ids of the API keys of all open polls."""
        return {parked.key_id for polls in self._polls.values() for parked in polls.all if parked.key_id}

    def end_polls_of_keys(self, key_ids: Collection[str], *, if_for_all_runs: bool = False) -> None:
        """End the open polls with these API keys, without tasks; with `if_for_all_runs`, only those for all runs."""
        for polls in self._polls.values():
            for parked in polls.all:
                if parked.key_id in key_ids and not (if_for_all_runs and parked.poll.viewer_id):
                    parked.leave()

    async def wait(self, parked: ParkedPoll, call_on_disconnect: ClientWatch | None = None) -> PollAnswer:
        """Return tasks or cancellations for a worker as soon as there are any; an empty answer after the time of the
        poll.

        The answer is empty too once its client has left: tasks for a dead worker would wait for the end of their
        leases. Raises 409 for a stopped worker, 503 while too many workers wait or the gateway stops, and the error of
        the first look for tasks, such as `DatabaseUnavailable`.
        """
        await self.open(parked, call_on_disconnect)
        try:
            return await self.wait_first(parked) or EMPTY_ANSWER
        finally:
            self.close_poll(parked)

    async def open(self, parked: ParkedPoll, call_on_disconnect: ClientWatch | None = None) -> None:
        """Add a new poll, which is answered from now on; the caller must call `close_poll` for it.

        Claims begin at once if the organization may have tasks, else a moment later for all its new polls.
        `call_on_disconnect` registers a callback that ends the poll once its client has left. Raises 503 while too
        many workers wait or the gateway stops.
        """
        await self._listen()
        if self._is_closed:  # nothing would end a poll that is parked after `release`
            raise errors.not_ready("This gateway is stopping: try again")
        organization_id = parked.poll.organization_id
        parked.place = self.places.take(organization_id, parked.key_id, parked.leave)
        polls = self._polls.get(organization_id)
        if polls is None:
            polls = self._polls[organization_id] = OrganizationPolls()
        polls.add(parked)
        if call_on_disconnect is not None:
            call_on_disconnect(parked.leave)
        if not polls.is_quiet:
            self._start(organization_id, polls)
        elif polls.delay is None:
            delay = LOOK_TOGETHER_SECONDS * min(len(polls.all) / MANY_POLLS, 1)
            polls.delay = asyncio.get_running_loop().call_later(delay, self._start, organization_id, polls)

    @staticmethod
    async def wait_first(parked: ParkedPoll) -> PollAnswer | None:
        """Return the answer to a poll, None if a heartbeat is due before.

        Raises 409 for a stopped worker, and the error of the first look for tasks, such as `DatabaseUnavailable`.
        """
        answer = await parked.wait()
        if answer is not None and answer.is_stopped:
            raise errors.conflict("worker-stopped", "The worker has said that it stops: start with a new id")
        return answer

    def close_poll(self, parked: ParkedPoll) -> None:
        """Remove a poll that `open` has added, since its client has the answer or is gone."""
        organization_id = parked.poll.organization_id
        if parked.place is not None:
            parked.place.release()
        self._heartbeats.discard(parked)
        parked.close()
        if (polls := self._polls.get(organization_id)) is not None:
            polls.discard(parked)
            self._forget(organization_id, polls)

    async def _listen(self) -> None:
        """Subscribe this gateway to notifications of tasks, at the first poll only: most gateways have no
        task workers.
        """
        if self._listening is None:
            self._listening = asyncio.create_task(
                self._broker.listen(self._receive, subject=CHANGED_EXECUTIONS)
            )
        if not self._listening.done():
            await asyncio.shield(self._listening)

    def _forget(self, organization_id: str, polls: OrganizationPolls) -> None:
        """Forget an organization if it has no open polls left and no look for its tasks is running; otherwise do
        nothing.

        A delayed look is cancelled.
        """
        if not polls.all and polls.serving is None:
            if polls.delay is not None:
                polls.delay.cancel()
            if self._polls.get(organization_id) is polls:
                del self._polls[organization_id]

    # ── news ────────────────────────────────────────────────────────────────────────────────────────────────

    def _receive(self, notification: Notification) -> None:
        """Claim tasks for the polls of organizations with changed tasks, and answer the polls of stopping and draining
        workers, in the background, on a notification of the broker; others are ignored.
        """
        if not isinstance(notification, ChangedExecutions):
            return
        for key in notification.execution_ids:
            if (organization_id := organization_of_key(key)) is not None:
                self._watched.pop(organization_id, None)
                self.serve(organization_id)
            elif (organization_id := organization_of_key(key, WORKERS_PREFIX)) is not None:
                self._watched.pop(organization_id, None)
                self._serve_leaving(organization_id)

    def serve(self, organization_id: str) -> None:
        """Claim tasks for the open polls of an organization, in the background, since its tasks have changed."""
        if (polls := self._polls.get(organization_id)) is not None:
            polls.admits = True
            polls.may_guess |= polls.is_quiet
            self._start(organization_id, polls)

    def _serve_leaving(self, organization_id: str) -> None:
        """Answer the open polls of an organization's stopping and draining workers here, in the background."""
        if (polls := self._polls.get(organization_id)) is not None:
            polls.has_leaving = True
            self._start(organization_id, polls)

    def repeat_failed_looks(self) -> None:
        """Repeat failed looks for stopping and draining workers, in the background."""
        for organization_id, polls in list(self._polls.items()):
            if polls.has_leaving:
                self._start(organization_id, polls)

    async def announce_leaving(self, organization_id: str) -> None:
        """Answer the open polls of an organization's stopping and draining workers here, in the background, and notify
        the other gateways; an unavailable broker is only logged.
        """
        self._serve_leaving(organization_id)
        await self._publish([workers_key(organization_id)])

    async def announce(self, organization_ids: Collection[str]) -> None:
        """Serve the polls of organizations with changed tasks here, in the background, and notify the other gateways;
        an unavailable broker is only logged.
        """
        for organization_id in organization_ids:
            self.serve(organization_id)
        await self._publish(map(watch_key, organization_ids))

    async def _publish(self, keys: Iterable[str]) -> None:
        """Publish notifications with these keys, each of an organization; an unavailable broker is only logged."""
        try:
            await self._broker.publish(dict.fromkeys(keys, ""))
        except BrokerUnavailable as error:
            log.debug("tasks not announced", reason=str(error))

    async def _watch(self, organization_id: str) -> bool:
        """Ask the broker to announce the next change of an organization's tasks; return whether it will.

        It is asked again only before the watch would end. False while the broker is unavailable.
        """
        now = monotonic()
        if now - self._watched.get(organization_id, -inf) < WATCH_SECONDS:
            return True
        self._watched[organization_id] = now
        try:
            await self._broker.watch([watch_key(organization_id), workers_key(organization_id)])
        except BrokerUnavailable as error:
            log.debug("tasks not watched", reason=str(error))
            self._watched.pop(organization_id, None)
        return organization_id in self._watched

    # ── service ─────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, organization_id: str, polls: OrganizationPolls) -> None:
        """Look for tasks of an organization in the background, and claim if there are any; a running look is
        repeated.
        """
        polls.is_wanted, polls.is_quiet = True, False
        if polls.delay is not None:
            polls.delay.cancel()
            polls.delay = None
        if polls.serving is None and not self._is_closed:
            polls.serving = asyncio.create_task(self._serve(organization_id, polls))

    async def _serve(self, organization_id: str, polls: OrganizationPolls) -> None:
        """Look for tasks of an organization and claim them, as long as something has changed meanwhile;
        errors are logged.
        """
        try:
            while polls.is_wanted:
                polls.is_wanted = False
                try:
                    await self._serve_once(organization_id, polls)
                except (DatabaseUnavailable, LockWaitTimeout) as error:
                    log.debug("task polls not served", reason=str(error))  # the look once a second does it
                except Exception:
                    log.exception("task polls not served")
        finally:
            polls.serving = None
            self._forget(organization_id, polls)

    async def _serve_once(self, organization_id: str, polls: OrganizationPolls) -> None:
        """Look once for news of an organization: answer the polls that they concern, and claim tasks for the others.

        An error of the look is raised and fails the new polls; one of the claims is only raised.
        """
        await self._claim_likely(organization_id, polls)
        # First the watch, then the look: a task that is created in between is announced.
        is_watched = await self._watch(organization_id)
        new = polls.take_new()
        try:
            news = await self._look(organization_id, polls, new)
            self._answer_news(polls, news)
        except Exception as error:
            for one in new:
                one.fail(error)
            raise
        polls.enqueue(new)
        polls.is_quiet = is_watched and not news.queues and not polls.is_wanted
        try:
            await self._claim_all(organization_id, polls, news.queues)
        finally:
            for one in new:
                self._begin_waiting(one)

    def _begin_waiting(self, parked: ParkedPoll) -> None:
        """Let the time and the heartbeats of a poll begin after its first look, unless that has ended it.

        Not earlier, so that also a poll that does not wait gets tasks, and no heartbeat precedes a refusal.
        """
        if not parked.is_over:
            parked.begin_waiting()
            if parked.has_heartbeats:
                self._heartbeats.add(parked)

    async def _look(
        self, organization_id: str, polls: OrganizationPolls, new: Sequence[ParkedPoll]
    ) -> OrganizationNews:
        """Read the news for an organization's polls: queues with tasks, requested cancellations, workers that stop,
        and tasks that an earlier claim of the same request has leased.

        Repeated claims are looked for among the polls `new`. If a change may have freed places of a concurrency key,
        tasks that wait for one are admitted, and the news is read again. After an error, the next look makes up for
        this one.
        """
        admits, polls.admits = polls.admits, False
        has_leaving, polls.has_leaving = polls.has_leaving, False
        try:
            return await self._read_news(
                organization_id, polls.all if has_leaving else new, new, admits=admits
            )
        except BaseException:
            # The next look makes up for this one, which no other notification may follow.
            polls.admits, polls.has_leaving = polls.admits or admits, polls.has_leaving or has_leaving
            raise

    async def _read_news(
        self,
        organization_id: str,
        asked: Iterable[ParkedPoll],
        new: Sequence[ParkedPoll],
        *,
        admits: bool,
    ) -> OrganizationNews:
        """Read the news of an organization: of the workers of `asked` those that leave, of `new` polls those that
        repeat a claim. With `admits`, tasks that wait for a concurrency key are admitted first.
        """
        new_polls, worker_ids = [one.poll for one in new], [one.poll.worker_id for one in asked]
        news = await self._tasks.claims.read_news(organization_id, new_polls, worker_ids)
        if admits and news.limited_keys and await self._tasks.upkeep.admit(news.limited_keys):
            news = await self._tasks.claims.read_news(organization_id, new_polls, worker_ids)
        return news

    def _answer_news(self, polls: OrganizationPolls, news: OrganizationNews) -> None:
        """Answer polls with cancellations, drains, and the tasks of earlier polls with the same request."""
        cancelling: dict[str, list[str]] = {}
        for worker_id, task_id in news.cancelling:
            cancelling.setdefault(worker_id, []).append(task_id)
        concerned = {*cancelling, *news.leaving, *(worker_id for worker_id, _ in news.repeated)}
        if not concerned:
            return
        for one in polls.of_workers(concerned):
            worker_id = one.poll.worker_id
            repeated = news.repeated.get((worker_id, one.poll.request_id), ())
            new = self._take_unreported(cancelling.get(worker_id, ()))
            stops = news.leaving.get(worker_id)
            if repeated or new or stops is not None:
                one.resolve(PollAnswer(repeated, new, stops is False, stops is True and not repeated))

    def _take_unreported(self, task_ids: Sequence[str]) -> list[str]:
        """Return those cancellations that no open poll has reported within the last five seconds, and note
        them as reported.
        """
        now = monotonic()
        new = [one for one in task_ids if self._reported_until.get(one, 0.0) <= now]
        for one in new:
            self._reported_until[one] = now + REPORTED_SECONDS
        while len(self._reported_until) > MAX_REPORTED:
            del self._reported_until[next(iter(self._reported_until))]
        return new

    async def _claim_all(self, organization_id: str, polls: OrganizationPolls, queues: Sequence[str]) -> None:
        """Claim tasks of these queues for waiting polls, and answer the polls with them; polls with the most free
        slots come first.

        Ends when polls or tasks run out, or other gateways keep the remaining tasks locked. Tasks for polls that have
        ended meanwhile are put back.
        """
        for viewer_id in polls.viewer_ids:
            remaining = await self._claim_as(organization_id, polls, queues, viewer_id)
            if not viewer_id:
                queues = remaining  # no viewer finds a task where polls for all runs find none

    async def _claim_as(
        self, organization_id: str, polls: OrganizationPolls, queues: Sequence[str], viewer_id: str
    ) -> Sequence[str]:
        """Claim tasks of these queues for the waiting polls of one viewer, and return the queues that may have more."""
        pauses = list(LOCKED_PAUSES)
        while queues and (chosen := polls.take_fitting(queues, viewer_id)):
            claim = await self._claim_for(organization_id, polls, chosen, queues)
            if not claim.has_more:
                queues = [queue for queue in queues if not chosen[0].poll.serves(queue)]
            elif not claim.count:
                if not pauses:
                    break  # the look once a second finds the rest
                await asyncio.sleep(pauses.pop())
        return queues

    async def _claim_likely(self, organization_id: str, polls: OrganizationPolls) -> None:
        """Claim, after a notification, once from the queue of the last task, before any look.

        In a quiet organization a new task begins a look earlier so. A wrong guess costs one statement, and the look
        that follows makes up for an error.
        """
        is_allowed, polls.may_guess = polls.may_guess, False
        if not is_allowed or polls.likely_queue is None:
            return
        queues = [polls.likely_queue]
        if chosen := polls.take_fitting(queues):
            try:
                await self._claim_for(organization_id, polls, chosen, queues)
            except (DatabaseUnavailable, LockWaitTimeout) as error:
                log.debug("likely tasks not claimed", reason=str(error))

    async def _claim_for(
        self,
        organization_id: str,
        polls: OrganizationPolls,
        chosen: Sequence[ParkedPoll],
        queues: Sequence[str],
    ) -> Claim:
        """Claim tasks of these queues for chosen polls with equal types and pools, and answer these with them.

        The polls without tasks wait again; tasks for polls that have ended meanwhile are put back.
        """
        try:
            claim = await self._tasks.claims.claim([one.poll for one in chosen], queues)
            unwanted = [
                task
                for one, tasks in zip(chosen, claim.tasks, strict=True)
                if tasks and not one.resolve(PollAnswer(tasks))
                for task in tasks
            ]
        finally:
            polls.enqueue(chosen)
        polls.likely_queue = next(filter(chosen[0].poll.serves, queues), None) if claim.count else None
        if unwanted:
            await self._tasks.claims.put_back(unwanted)
            self._start(organization_id, polls)
        return claim

    def release(self) -> None:
        """Answer all open polls without tasks and refuse new ones, because the gateway stops."""
        self._is_closed = True
        self._heartbeats.close()
        for parked in [one for polls in self._polls.values() for one in polls.all]:
            parked.resolve(EMPTY_ANSWER)

    async def close(self) -> None:
        """Answer all open polls without tasks, and end the background work."""
        self.release()
        serving = [polls.serving for polls in self._polls.values() if polls.serving is not None]
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
