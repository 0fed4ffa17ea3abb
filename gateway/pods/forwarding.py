"""Forwarding of wakeups to pods that have no open poll at this gateway. A woken pod claims its runs as usual.

A wakeup carries no data of a run. So no run can be lost on the way or taken by a stopping pod. Another
process that has since received the address of the pod can't read any run either.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

import structlog
from msgspec import Struct
from sqlalchemy import select
from sqlmodel import col

from concurrency.ttl_cache import TTLCache
from messages import wakeups
from models import deployment_token
from models.deployment import POSSIBLY_SERVING_STATES, Deployment
from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import aiohttp

    from messages.broker import Broker
    from models.database import Database

log = structlog.get_logger()

WAKEUP_SECONDS: Final = 2.0
REMEMBERED_SECONDS: Final = 1.0
MAX_REMEMBERED: Final = 10_000
ACCEPTED: Final = 202
UNAUTHORIZED: Final = 401


class ReadyPods(Struct, frozen=True):
    """Addresses of the ready pods of a deployment, and the keys with which they accept wakeups."""

    addresses: Sequence[str] = ()
    keys: Sequence[str] = ()
    """Newest first; includes the keys of pods that are being replaced."""


class WakeupForwarder:
    """Client with which one gateway sends wakeups to pods."""

    def __init__(self, database: Database, broker: Broker) -> None:
        self._database = database
        self._broker = broker
        self._cached_pods: TTLCache[str, ReadyPods] = TTLCache(REMEMBERED_SECONDS, MAX_REMEMBERED)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._requested_again: set[str] = set()
        self._session: aiohttp.ClientSession | None = None

    def forward(self, workflow_id: str) -> None:
        """Wake one ready pod of a workflow in the background, if there is any; calls during a wake lead to
        one more.
        """
        if workflow_id in self._tasks:
            self._requested_again.add(workflow_id)
        else:
            self._tasks[workflow_id] = asyncio.create_task(self._forward(workflow_id))

    async def close(self) -> None:
        """Cancel all forwarding and close the HTTP session."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _forward(self, workflow_id: str) -> None:
        """Wake pods of a workflow until no further wake was requested; failures are only logged."""
        try:
            is_wanted = True
            while is_wanted:
                self._requested_again.discard(workflow_id)
                await self._wake_one_pod(workflow_id)
                is_wanted = workflow_id in self._requested_again
        except DatabaseUnavailable as error:
            log.debug("pods not woken", workflow_id=workflow_id, error=str(error))
        except Exception:
            log.exception("pods not woken", workflow_id=workflow_id)
        finally:
            del self._tasks[workflow_id]

    async def _wake_one_pod(self, workflow_id: str) -> None:
        """Wake one ready pod of a workflow, in random order; if none accepts, wake the deployer.

        Nothing happens without ready pods. Addresses are cached for a second.
        """
        pods = self._cached_pods.get(workflow_id)
        if pods is None:
            pods = await self._find(workflow_id)
            self._cached_pods.put(workflow_id, pods)
        for address in random.sample(pods.addresses, len(pods.addresses)):
            if await self._accepts_wakeup(address, pods.keys):
                return
        if pods.addresses:
            # The pods are gone or about to go. The deployer starts others for the pending run.
            log.info("pods not reached", workflow_id=workflow_id, pods=len(pods.addresses))
            self._cached_pods.drop(workflow_id)
            await wakeups.wake_deployer(self._broker, workflow_id)

    async def _find(self, workflow_id: str) -> ReadyPods:
        """Return addresses and wakeup keys of the ready pods of a deployment; none if it drains or isn't deployed."""
        ready = select(col(Deployment.ready_addresses)).where(
            col(Deployment.workflow_id) == workflow_id,
            col(Deployment.is_deployed),
            col(Deployment.observed).in_(POSSIBLY_SERVING_STATES),
            col(Deployment.drain_until).is_(None),
        )
        async with self._database.read() as connection:
            addresses = await connection.scalar(ready)
            if not addresses:
                return ReadyPods()
            return ReadyPods(tuple(addresses), await deployment_token.wakeup_keys(connection, workflow_id))

    async def _accepts_wakeup(self, address: str, keys: Sequence[str]) -> bool:
        """Send a wakeup to a pod, and return whether it accepted it with one of the keys within two seconds.

        False for a draining pod, for another process at its address, and without an answer.
        """
        import aiohttp  # noqa: PLC0415 - its client costs 15 MB, which a gateway saves while all pods poll it

        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(WAKEUP_SECONDS))
        for key in keys:
            headers = {"Authorization": f"Bearer {key}"}
            try:
                async with self._session.post(
                    f"{address}/trigger", headers=headers, allow_redirects=False
                ) as response:
                    if response.status != UNAUTHORIZED:
                        return response.status == ACCEPTED
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                log.debug("pod not reached", address=address, error=str(error) or type(error).__name__)
                return False
        return False
