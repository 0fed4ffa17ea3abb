"""Checks of the API keys of open polls: a poll ends within about a second after its key."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from models import access_store
from models.access import KeyScope

if TYPE_CHECKING:
    from gateway.tasks.poll_service import PollService
    from models.database import Database

CHECKED_TOGETHER: Final = 500
"""Keys that one query reads; with more keys, several calls check them all in turn."""


class PollKeyChecker:
    """Checker of the keys with which the open polls of one gateway were authenticated."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._unchecked: deque[str] = deque()

    async def end_refused(self, polls: PollService) -> None:
        """End the polls, without tasks, whose keys are revoked, expired, or without the scope by now, and those for all
        runs of users who are no admins any more.

        Their next polls are refused. A call checks at most 500 keys with one query, and the next calls the others; none
        without open polls. Raises `DatabaseUnavailable`.
        """
        if not self._unchecked:
            self._unchecked.extend(polls.key_ids())
        part = {self._unchecked.popleft() for _ in range(min(len(self._unchecked), CHECKED_TOGETHER))}
        if not part:
            return
        found = await access_store.find_keys_by_id(self._database, part)
        now = self._database.clock.now()
        may_work = {
            key_id
            for key_id, one in found.items()
            if one.is_valid(now) and one.caller.has_scope(KeyScope.TASKS_WORK)
        }
        if refused := part - may_work:
            polls.end_polls_of_keys(refused)
        if limited := {key_id for key_id in may_work if not found[key_id].caller.is_admin}:
            polls.end_polls_of_keys(limited, if_for_all_runs=True)
