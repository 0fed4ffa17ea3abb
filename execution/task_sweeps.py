"""Sweeps of tasks by workers, in case that no gateway has polls of task workers."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from journal import concurrency_limits
from messages import wakeups
from messages.broker import BrokerUnavailable
from models.task_states import watch_key

if TYPE_CHECKING:
    from journal.tasks.task_upkeep import TaskUpkeep
    from messages.broker import Broker
    from models.database import Database


async def move_due_tasks(database: Database, tasks: TaskUpkeep, broker: Broker) -> None:
    """Move tasks whose time has come (leases, deadlines, delays), and notify the runs and task workers that
    they concern.

    At most 200 tasks a call. Raises `DatabaseUnavailable`.
    """
    effects = await tasks.sweep()
    for key in sorted({run.concurrency_key for run in effects.woken if run.concurrency_key is not None}):
        await concurrency_limits.admit_waiting_runs(database, key)
    if effects.woken:
        await wakeups.wake_workers(broker)
    if effects.answered:
        await wakeups.notify_answered_runs(broker, effects.answered)
    changed = effects.ready_organizations | effects.cancelling_organizations
    if effects.freed_keys:
        changed |= await tasks.admit(sorted(effects.freed_keys))
    if changed:
        with suppress(BrokerUnavailable):
            await broker.publish(dict.fromkeys(map(watch_key, changed), ""))
