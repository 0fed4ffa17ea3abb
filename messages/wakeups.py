"""Wakeups that there is something to do, for those who would otherwise find it by their next sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from messages.broker import BrokerUnavailable
from messages.deployer_messages import ReconcileDeployment

if TYPE_CHECKING:
    from messages.broker import Broker, RunBroker

log = structlog.get_logger()


async def wake_workers(broker: RunBroker) -> None:
    """Say "there is work", after the commit; with the broker away, the rows say so themselves."""
    try:
        await broker.wake_workers()
    except BrokerUnavailable as error:
        log.debug("workers not woken", reason=str(error))


async def wake_mail_parsers(broker: Broker) -> None:
    """Say that something has come that is to be read first, after the commit; with the broker away, its row says so."""
    try:
        await broker.wake_mail_parsers()
    except BrokerUnavailable as error:
        log.debug("readers not woken", reason=str(error))


async def wake_deployer(broker: Broker, workflow_id: str) -> None:
    """Say that something else is wanted of a deployment, after the commit; with the broker away, its row says so."""
    try:
        await broker.notify_deployer(ReconcileDeployment(workflow_id))
    except BrokerUnavailable as error:
        log.debug("deployer not told", reason=str(error))
