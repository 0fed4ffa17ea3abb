"""Long poll at the gateway through which a pod learns of work and requests, in place of a broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog

from execution.pod_api import MAX_WAIT_SECONDS, WorkPollRequest, WorkPollResponse
from messages.broker import NO_GRANTS, DirectMessage, DirectRuns, Notification, SlotGrant
from messages.worker_wakeup import ALL_SHARDS
from models.ended_execution import EndedExecution
from models.errors import DatabaseUnavailable
from runner.gateway_client import CallRefused

if TYPE_CHECKING:
    from runner.gateway_client import GatewayClient

log = structlog.get_logger()

GRACE_SECONDS: Final = 10.0
MAX_REMEMBERED: Final = 1_000
MAX_GATEWAYS: Final = 100
REFUSED_SECONDS: Final = 1.0
"""Pause after a refusal. Calls to an unreachable gateway already pause by themselves."""
POLL_PAUSE_SECONDS: Final = 1.0
"""Seconds after a wakeup during which polls don't ask for work, since the executor knows of it."""


class GatewayWorkPoll:
    """Long poll at the gateway; implements `messages.broker.RunBroker`."""

    def __init__(self, gateway: GatewayClient, *, channel: str) -> None:
        self.channel = channel
        self._gateway = gateway
        self._on_notification: Callable[[Notification], None] | None = None
        self._heard: dict[str, str] = {}
        self._run_counts: dict[str, int] = {}
        self._woken_at = float("-inf")
        self._task: asyncio.Task[None] | None = None

    async def wake_workers(self, shard: int = ALL_SHARDS) -> None:
        """Do nothing: other pods poll for themselves."""

    async def publish(
        self,
        channels: Mapping[str, str],
        outcomes: Sequence[EndedExecution] = (),
        grants: Mapping[str, SlotGrant] = NO_GRANTS,
    ) -> None:
        """Do nothing: the gateway itself stores the changes of runs, and publishes them."""

    async def listen(self, on_notification: Callable[[Notification], None]) -> None:
        """Set the callback for requests to stop or cancel a run of this pod, in place of an earlier one.

        It returns at once: the poll that `start_worker` begins calls it on the event loop.
        """
        self._on_notification = on_notification

    def start_worker(self, on_wakeup: Callable[[int], None]) -> None:
        """Poll the gateway for work in the background; call `on_wakeup` on the event loop when runs may be pending."""
        self._task = asyncio.create_task(self._poll(on_wakeup))

    def receive_direct(self, on_runs: Callable[[DirectRuns], None]) -> None:
        """Do nothing: no runs are assigned to pods, which claim those of their deployment."""

    async def stop_worker(self) -> None:
        """End the poll of the gateway, and wait for its end: no more wakeups and requests arrive.

        Runs that finish meanwhile learn of requests by their lease renewals.
        """
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def close(self) -> None:
        """End the poll of the gateway for work, as `stop_worker` does."""
        await self.stop_worker()

    async def _poll(self, on_wakeup: Callable[[int], None]) -> None:
        """Ask the gateway for work and for requests to end runs, and pass both on, until canceled;
        pause after a failure.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                rest = self._woken_at + POLL_PAUSE_SECONDS - loop.time()
                news = await self._wait(rest)
            except DatabaseUnavailable as error:
                log.debug("work poll failed", error=str(error))
                continue
            except CallRefused as error:
                log.warning("work poll failed", error=str(error))
                await asyncio.sleep(REFUSED_SECONDS)
                continue
            self._note_run_count(news)
            for execution_id, request in news.requests.items():
                self._remember(execution_id, request)
                if self._on_notification is not None:
                    self._on_notification(DirectMessage({"execution_id": execution_id, "request": request}))
            if news.has_work:
                self._woken_at = loop.time()
                on_wakeup(ALL_SHARDS)

    def _remember(self, execution_id: str, request: str) -> None:
        """Remember the last request to an execution, so that the gateway doesn't send it again; the latest
        1,000 are kept.
        """
        self._heard.pop(execution_id, None)
        self._heard[execution_id] = request
        while len(self._heard) > MAX_REMEMBERED:
            del self._heard[next(iter(self._heard))]

    def _note_run_count(self, news: WorkPollResponse) -> None:
        """Remember the last run count of a gateway, which the next poll sends back;
        the latest 100 gateways are kept.
        """
        self._run_counts.pop(news.gateway, None)
        self._run_counts[news.gateway] = news.run_count
        while len(self._run_counts) > MAX_GATEWAYS:
            del self._run_counts[next(iter(self._run_counts))]

    async def _wait(self, rest: float) -> WorkPollResponse:
        """Poll the gateway once, which may take half a minute, and return its answer.

        With a positive `rest` it takes so many seconds at most, and asks only for requests to end runs, not for work.
        """
        seconds = rest if rest > 0 else MAX_WAIT_SECONDS
        call = WorkPollRequest(seconds, wants_work=rest <= 0, heard=self._heard, run_counts=self._run_counts)
        return await self._gateway.call("/wait", call, WorkPollResponse, seconds=seconds + GRACE_SECONDS)
