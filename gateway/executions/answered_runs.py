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
    """Admit waiting runs of the concurrency key of a committed answer; if the answer lets its run continue, wake the
    workers and the pods of the run's deployment.

    A sweep makes up for a lost wakeup. Raises `DatabaseUnavailable`.
    """
    if answer.concurrency_key is not None:
        await concurrency_limits.admit_waiting_runs(database, answer.concurrency_key)
    if answer.is_woken:
        acceptances.wake_workers()
        if answer.deployment_id is not None:
            await pods.notify_pods([answer.deployment_id])
