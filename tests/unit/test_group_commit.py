"""Batches of group commits, and items that wait for the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from journal.group_commit import GroupCommit


async def committed_batches(*weights: int, max_weight: int) -> list[list[int]]:
    """Return the batches in which waiting items of these weights are committed."""
    committed: list[list[int]] = []

    async def commit(batch: Sequence[int]) -> Sequence[None]:
        committed.append([*batch])
        return [None] * len(batch)

    group: GroupCommit[int, None] = GroupCommit(commit, weigh=lambda weight: weight, max_weight=max_weight)
    await asyncio.gather(*(group.submit(weight) for weight in weights))
    return committed


async def test_the_longest_waiting_item_goes_first_with_all_that_fit() -> None:
    assert await committed_batches(90, 80, 5, 5, 70, 1, max_weight=100) == [[90, 5, 5], [80, 1], [70]]


async def test_an_item_heavier_than_a_batch_is_committed_alone() -> None:
    assert await committed_batches(500, 1, 2, max_weight=100) == [[500], [1, 2]]
