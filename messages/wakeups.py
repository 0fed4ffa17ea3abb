"""Wakeups for processes that would otherwise find the work by their next sweep.

Send them after the commit. An unavailable broker is ignored, since the rows are committed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from messages.broker import BrokerUnavailable
from messages.deployer_messages import ReconcileDeployment

if TYPE_CHECKING:
    from messages.broker import Broker, RunBroker

log = structlog.get_logger()


async def wake_workers(broker: RunBroker) -> None:
    """Wake a worker for pending runs."""
    try:
        await broker.wake_workers()
    except BrokerUnavailable as error:
        log.debug("workers not woken", reason=str(error))


async def wake_mail_parsers(broker: Broker) -> None:
    """Wake a mail parser for unparsed mail."""
    try:
        await broker.wake_mail_parsers()
    except BrokerUnavailable as error:
        log.debug("mail parsers not woken", reason=str(error))


async def wake_deployer(broker: Broker, workflow_id: str) -> None:
    """Wake a deployer for a deployment with a new desired state."""
    try:
        await broker.notify_deployer(ReconcileDeployment(workflow_id))
    except BrokerUnavailable as error:
        log.debug("deployer not woken", reason=str(error))
