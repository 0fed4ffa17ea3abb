"""URLs of approval links for nodes; the hash of each is stored before its URL leaves the server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlmodel import col

from engine.run_errors import NodeError
from execution.retry import until_available
from journal.store import ExecutionKey
from journal.waits import approvals
from models.execution import Execution

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.services import RunCaller
    from models.database import Database


class ApprovalLinkUrls:
    """Links without an assignee of their own; implements `engine.services.ApprovalLinkService`."""

    def __init__(self, database: Database, secret: bytes, public_url: str) -> None:
        self._database = database
        self._secret = secret
        self._public_url = public_url.rstrip("/")

    async def create_links(self, caller: RunCaller, places: Sequence[tuple[str, str]]) -> Sequence[str]:
        """Store an approval link for each place (node id and iteration), unless it is stored; return their URLs in that
        order.

        Anyone may use such a link. Waits while the database is unavailable. Raises `NodeError` without a public address
        of the server, and if the run no longer exists.
        """
        if not self._public_url:
            raise NodeError("PILOTFLAME_PUBLIC_URL is not set: links need the address of the gateway")
        store = partial(self._store, caller, places)
        return await until_available(lambda: self._database.transaction(store))

    async def _store(
        self, caller: RunCaller, places: Sequence[tuple[str, str]], connection: AsyncConnection
    ) -> Sequence[str]:
        shard = await connection.scalar(
            select(col(Execution.shard)).where(
                col(Execution.id) == caller.execution_id,
                col(Execution.organization_id) == caller.organization_id,
            )
        )
        if shard is None:
            raise NodeError("The execution no longer exists")
        key, urls = ExecutionKey(caller.execution_id, shard), []
        for node_id, iteration in places:
            token = approvals.derive_token(self._secret, key, node_id, iteration, approvals.ANYONE)
            place = approvals.LinkPlace(key, caller.organization_id, node_id, iteration, approvals.ANYONE)
            await approvals.store_link(connection, place, approvals.hash_token(token))
            urls.append(f"{self._public_url}/approve/{token}")
        return urls
