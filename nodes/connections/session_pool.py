"""Pool of sessions of one data source: limited in number, kept for a while after use and never after a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nodes.connections.database_session import DatabaseSession

OPEN_SECONDS = 10
"""Time that the opening of an abandoned session may take before it is canceled."""
CLOSE_SECONDS = 5
RESET_SECONDS = 5


class SessionPool:
    """Pool of sessions; a borrower releases or discards its session."""

    def __init__(
        self,
        open_session: Callable[[], Awaitable[DatabaseSession]],
        *,
        max_connections: int,
        idle_seconds: float,
    ) -> None:
        self._open_session = open_session
        self._idle_seconds = idle_seconds
        self._slots = asyncio.Semaphore(max_connections)
        self._lent = 0
        self._idle: dict[DatabaseSession, asyncio.TimerHandle] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._is_retired = False

    @property
    def is_unused(self) -> bool:
        """Whether the pool has no session, open or closing, and no caller waits for one."""
        return not self._lent and not self._idle and not self._endings and not self._slots.locked()

    async def acquire(self) -> DatabaseSession:
        """Return a session for exclusive use, a living idle one or a new one; wait, without a time limit, while all are
        in use.

        The caller must pass it to `release` or `discard`. Raises the errors of opening a session.
        """
        await self._slots.acquire()
        self._lent += 1
        try:
            while self._idle:
                session, expiry = self._idle.popitem()
                expiry.cancel()
                if await self._check_alive(session):
                    return session
            return await self._open_within_limit()
        except BaseException:
            self._free_slot()
            raise

    async def _open_within_limit(self) -> DatabaseSession:
        """Open a session and return it; if the caller is canceled meanwhile, the session is closed in the background
        once it is open, or its opening is canceled after ten seconds.
        """
        opening = asyncio.ensure_future(self._open_session())
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            # A driver that is canceled during login leaves unhandled errors behind.
            self._in_background(self._close_once_open(opening))
            raise

    async def _close_once_open(self, opening: asyncio.Future[DatabaseSession]) -> None:
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                session = await opening
        except Exception:  # noqa: BLE001 - the caller has gone
            return
        await _close_session(session)

    def release(self, session: DatabaseSession) -> None:
        """Return a session to the pool after successful work, without waiting: its state is reset in the background
        before its next use.
        """
        self._in_background(self._reset(session))

    def discard(self, session: DatabaseSession) -> None:
        """Close a session whose state is unknown, in the background; it counts as in use until then."""
        self._in_background(self._end(session))

    async def close(self) -> None:
        """Close idle sessions, and wait for sessions that are being reset or closed; borrowed sessions are closed at
        their release.
        """
        self._is_retired = True
        while self._idle:
            session, expiry = self._idle.popitem()
            expiry.cancel()
            await _close_session(session)
        while self._endings:
            await asyncio.wait(self._endings)

    async def _check_alive(self, session: DatabaseSession) -> bool:
        """Return whether the connection of an idle session is open; close the session if not."""
        try:
            if await session.is_alive():
                return True
        except BaseException:
            await _close_session(session)
            raise
        await _close_session(session)
        return False

    async def _reset(self, session: DatabaseSession) -> None:
        """Reset a session and keep it as idle; close it if that fails or takes five seconds, or the pool is closed."""
        is_clean = False
        try:
            if not self._is_retired:
                async with asyncio.timeout(RESET_SECONDS):
                    is_clean = await session.reset()
        except TimeoutError:
            pass
        finally:
            if is_clean and not self._is_retired:
                loop = asyncio.get_running_loop()
                self._idle[session] = loop.call_later(self._idle_seconds, self._expire, session)
                self._free_slot()
            else:
                await self._end(session)

    async def _end(self, session: DatabaseSession) -> None:
        try:
            await _close_session(session)
        finally:
            self._free_slot()

    def _expire(self, session: DatabaseSession) -> None:
        if self._idle.pop(session, None) is not None:
            self._in_background(_close_session(session))

    def _free_slot(self) -> None:
        self._lent -= 1
        self._slots.release()

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)


async def _close_session(session: DatabaseSession) -> None:
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await session.close()
    except TimeoutError:
        session.abort()
