"""Continuation of runs whose nodes have got an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from journal import concurrency_limits

if TYPE_CHECKING:
    from gateway.executions.acceptance import PodNotifier, RunAcceptor
    from journal.waits.node_answers import AnswerResult
    from models.database import Database


async def continue_run(
    database: Database, acceptances: RunAcceptor, pods: PodNotifier, answer: AnswerResult
) -> None:
    """Let the run of a committed answer continue if the answer has woken it: admit waiting runs of its concurrency key
    to free slots, and wake workers and the pods of its deployment.

    A sweep makes up for a lost wakeup. Raises `DatabaseUnavailable`, but only for a run with a concurrency key.
    """
    if answer.concurrency_key is not None:
        await concurrency_limits.admit_waiting_runs(database, answer.concurrency_key)
    if answer.is_woken:
        acceptances.wake_workers()
        if answer.deployment_id is not None:
            await pods.notify_pods([answer.deployment_id])
