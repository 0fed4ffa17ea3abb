"""Redis stream as a message source, read through a consumer group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
import redis
import structlog
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError

from bridge.bridge_errors import BridgeRefused, BridgeUnavailable
from bridge.message_source import (
    SourceMessage,
    UnreadableMessage,
    decode_text,
    make_deduplication_id,
    parse_priority,
    to_json,
)

if TYPE_CHECKING:
    from bridge.settings import RedisBridgeSettings

StreamEntry = tuple[bytes, Mapping[bytes, bytes] | None]
"""Id and fields; None for an entry that was deleted before it was acknowledged."""

COMMAND_SECONDS: Final = 5.0
CLAIM_EVERY_SECONDS: Final = 5.0
OWN, NEW, BEGINNING = "0", ">", "0-0"
MESSAGE_FIELDS: Final = (b"message", b"data")
PRIORITY_FIELD: Final = b"priority"
REASON_FIELD: Final = b"refused"
FINAL_ERRORS: Final = ("WRONGTYPE", "WRONGPASS", "NOAUTH")
"""Prefixes of permanent errors of Redis."""

log = structlog.get_logger()


class RedisStream:
    """Implements `bridge.message_source.MessageSource`; processes share a stream as consumers of different names."""

    def __init__(self, settings: RedisBridgeSettings) -> None:
        self.label = settings.label("redis", settings.bridge_redis_stream)
        self._stream = settings.bridge_redis_stream
        self._group = settings.bridge_redis_group
        self._consumer = settings.bridge_redis_consumer
        self._deletes = settings.bridge_redis_delete
        self._dead_letters = settings.bridge_redis_dead_letters or f"{self._stream}.dead-letters"
        self._hold_milliseconds = settings.bridge_hold_seconds * 1000
        # By default redis-py repeats a command up to ten times, though it may have been executed before.
        self._client = Redis.from_url(
            settings.bridge_redis_url.get_secret_value(),
            retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=COMMAND_SECONDS,
        )
        # A timeout in the URL would override an argument, and cut every wait for entries short.
        self._client.connection_pool.connection_kwargs["socket_timeout"] = (
            settings.bridge_wait_seconds + COMMAND_SECONDS
        )
        self._has_group = False
        self._may_have_own = True
        """Whether this consumer may have pending entries that the process doesn't know."""
        self._claims_from = BEGINNING
        self._claims_at = 0.0

    async def take(self, limit: int, wait_seconds: float) -> Sequence[SourceMessage]:
        """Take pending entries that an earlier process of this consumer left,
        else abandoned ones of other consumers, else new.

        Creates the consumer group if it is missing, which begins at the first entry, and waits up to `wait_seconds` for
        new entries. Raises `BridgeUnavailable`, and `BridgeRefused` for wrong credentials or a key that is no stream.
        """
        async with self._translate_errors():
            await self._make_group()
            entries = await self._read_own(limit) or await self._claim_abandoned(limit)
            if not entries:
                entries = await self._read(NEW, limit, block_milliseconds=max(1, int(wait_seconds * 1000)))
            return await self._messages(entries)

    async def hold(self, ids: Sequence[str]) -> None:
        """Reset the idle time of entries, as if they had just been delivered, so that no other consumer claims them.

        Raises `BridgeUnavailable` and `BridgeRefused`.
        """
        await self._set_idle(ids, milliseconds=0)

    async def acknowledge(self, ids: Sequence[str]) -> None:
        """Acknowledge entries in the consumer group, so that no consumer gets them again, and delete them if
        configured.

        Raises `BridgeUnavailable` and `BridgeRefused`.
        """
        async with self._translate_errors():
            await self._acknowledge(ids)

    async def release(self, ids: Sequence[str]) -> None:
        """Set the idle time of entries to the hold time, so that other consumers claim them as abandoned.

        Raises `BridgeUnavailable` and `BridgeRefused`.
        """
        await self._set_idle(ids, milliseconds=self._hold_milliseconds)

    async def dead_letter(self, reasons: Mapping[str, str]) -> None:
        """Copy entries with their reasons (field `refused`) to the stream of dead letters, then acknowledge
        the originals.

        An entry that is gone from the stream is only acknowledged. Raises `BridgeUnavailable` and
        `BridgeRefused`.
        """
        async with self._translate_errors():
            for entry_id, reason in reasons.items():
                found = cast("list[StreamEntry]", await self._client.xrange(self._stream, entry_id, entry_id))
                for _, fields in found:
                    copied: dict[Any, Any] = {**(fields or {})}
                    await self._client.xadd(self._dead_letters, copied | {REASON_FIELD: reason})
                await self._acknowledge([entry_id])

    async def close(self) -> None:
        """Close the connections to Redis."""
        await self._client.aclose()

    async def _make_group(self) -> None:
        """Create the consumer group, and the stream with it, unless this process knows that it exists.

        The group begins at the first entry, so that earlier entries are not missed.
        """
        if self._has_group:
            return
        try:
            # The group begins at the first entry, so that entries from before its creation are not missed.
            await self._client.xgroup_create(self._stream, self._group, id=OWN, mkstream=True)
            log.info("consumer group created", stream=self._stream, group=self._group)
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._has_group = True

    async def _read_own(self, limit: int) -> Sequence[StreamEntry]:
        """Return entries that an earlier process of this consumer has left pending, up to `limit`; empty once
        there are none.
        """
        if not self._may_have_own:
            return []
        entries = await self._read(OWN, limit)
        self._may_have_own = len(entries) > 0
        return entries

    async def _claim_abandoned(self, limit: int) -> Sequence[StreamEntry]:
        """Claim up to `limit` entries of other consumers that were idle for the hold time; return them.

        Searches one page of pending entries per call. After the last page it returns nothing for
        `CLAIM_EVERY_SECONDS`.
        """
        loop = asyncio.get_running_loop()
        if loop.time() < self._claims_at:
            return []
        answer = await self._client.xautoclaim(
            self._stream, self._group, self._consumer, self._hold_milliseconds, self._claims_from, count=limit
        )
        self._claims_from, entries = answer[0].decode(), answer[1]
        if self._claims_from == BEGINNING:
            self._claims_at = loop.time() + CLAIM_EVERY_SECONDS
        if entries:
            log.info("entries claimed", stream=self._stream, count=len(entries))
        return list(entries)

    async def _read(
        self, which: str, limit: int, *, block_milliseconds: int | None = None
    ) -> Sequence[StreamEntry]:
        """Read up to `limit` entries of the consumer group: if `which` is an id, own pending ones after it; if it is
        `>`, new ones.

        `block_milliseconds` is how long to wait for new ones; None doesn't wait.
        """
        streams: dict[Any, Any] = {self._stream: which}
        answer: Any = await self._client.xreadgroup(
            self._group, self._consumer, streams, count=limit, block=block_milliseconds
        )
        # A pair for each stream with entries: in a list, or in a mapping with RESP3.
        pairs = answer.items() if isinstance(answer, dict) else answer or ()
        return [entry for _, entries in pairs for entry in entries]

    async def _messages(self, entries: Sequence[StreamEntry]) -> Sequence[SourceMessage]:
        """Convert entries to messages; entries that were trimmed from the stream are acknowledged and left out."""
        gone = [entry_id.decode() for entry_id, fields in entries if not fields]
        if gone:
            log.warning("entries were deleted before they were sent", stream=self._stream, ids=gone)
            await self._acknowledge(gone)
        return [self._message(entry_id.decode(), fields) for entry_id, fields in entries if fields]

    def _message(self, entry_id: str, fields: Mapping[bytes, bytes]) -> SourceMessage:
        """Convert an entry to a message; an unreadable one gets a `problem` instead of a body."""
        deduplication_id = make_deduplication_id(self.label, entry_id)
        try:
            body, priority = parse_entry(fields)
        except UnreadableMessage as error:
            return SourceMessage(entry_id, deduplication_id, problem=str(error))
        return SourceMessage(entry_id, deduplication_id, body, priority)

    async def _acknowledge(self, ids: Sequence[str]) -> None:
        """Acknowledge entries, and delete them from the stream if configured; raises the errors of Redis."""
        await self._client.xack(self._stream, self._group, *ids)
        if self._deletes:
            await self._client.xdel(self._stream, *ids)

    async def _set_idle(self, ids: Sequence[str], *, milliseconds: int) -> None:
        """Set the time for which entries count as idle, keeping their consumer."""
        async with self._translate_errors():
            await self._client.xclaim(
                self._stream, self._group, self._consumer, 0, list(ids), idle=milliseconds, justid=True
            )

    @asynccontextmanager
    async def _translate_errors(self) -> AsyncIterator[None]:
        """Raise errors of the Redis client in the block as `BridgeRefused` (credentials, wrong type) or
        `BridgeUnavailable`.

        After an error the group is created, and own pending entries are read, anew.
        """
        try:
            yield
        except (redis.RedisError, OSError) as error:
            # Entries of a lost response are pending for this consumer, and the server may have been replaced.
            self._may_have_own, self._has_group = True, False
            text = str(error) or type(error).__name__
            if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError):
                raise BridgeRefused(f"Redis refused: {text}") from error
            if isinstance(error, redis.ResponseError) and text.startswith(FINAL_ERRORS):
                raise BridgeRefused(f"Redis refused: {text}") from error
            raise BridgeUnavailable(f"Redis did not answer: {text}") from error


def parse_entry(fields: Mapping[bytes, bytes]) -> tuple[bytes, int | None]:
    """Return the JSON body and the priority of a stream entry (None without one).

    A field `message` or `data` is the body, alone or beside a field `priority`. Otherwise the body is an
    object of all fields as texts, without a priority. Raises `UnreadableMessage`.
    """
    rest = [name for name in fields if name != PRIORITY_FIELD]
    if len(rest) == 1 and rest[0] in MESSAGE_FIELDS:
        priority = fields.get(PRIORITY_FIELD)
        return to_json(fields[rest[0]]), parse_priority(None if priority is None else decode_text(priority))
    body = {decode_text(name): decode_text(value) for name, value in fields.items()}
    return msgspec.json.encode(body), None
