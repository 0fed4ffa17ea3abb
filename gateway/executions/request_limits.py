"""Limits of run requests: rates by token buckets that all gateways share, and backlogs of runs that have not started.

Tokens are leased in advance, used within half a second or expired, and none are leased for a slow client. One bucket
therefore passes at most `burst + (seconds + 0.5) * per_second` requests in any number of seconds, with any number of
gateways. Refused requests cost no message. While Redis is away, each gateway counts by itself.

Backlogs are of a workflow and of an organization, and no request counts rows. Each gateway adds the runs that it
accepts to a count that is at most a second old, or twenty times as old as counting takes. A limit can therefore be
exceeded by the runs that other gateways accept within that time, and by runs that are committed during a count. No
request is refused because of an outdated count.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

import structlog
from msgspec import Struct

from gateway.http import errors
from gateway.http.errors import ApiError
from journal import backlog
from journal.group_commit import GroupCommit
from messages.broker import BrokerUnavailable
from messages.token_buckets import BucketRate, LocalTokenBuckets, TokenDemand, TokenGrant
from models.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from gateway.settings import GatewaySettings
    from messages.broker import Broker
    from models.access import ApiCaller
    from models.database import Database

log = structlog.get_logger()

LEASE_SECONDS: Final = 0.5
"""Lifetime of leased tokens."""
ASK_SECONDS: Final = 0.25
"""Seconds for which a request waits for Redis."""
AWAY_SECONDS: Final = 5.0
"""Seconds without requests to Redis after it has not answered."""
MAX_LEASES: Final = 20_000

FRESH_SECONDS: Final = 1.0
COUNTING_SHARE: Final = 20
"""Counting one backlog takes at most one part in this many of the time."""
UNKNOWN_RETRY_SECONDS: Final = 5
MAX_TALLIES: Final = 20_000


class RateLimit(Struct, frozen=True):
    """Rate limit that applies to a request."""

    policy: str
    """Name of the limit in the headers of answers."""
    bucket: str
    """Key of the requests that are counted together."""
    rate: BucketRate


class TokenLease(Struct):
    """Tokens of a bucket that this process has leased."""

    tokens: int = 0
    until: float = 0.0
    spent: int = 0
    """Tokens used since the last request to the bucket."""
    awaited: int = 0
    """Tokens that waiting requests need."""
    left: int = 0
    """Tokens left in the bucket at the last request to it."""
    refused: int = 0
    """Number of tokens that the bucket has refused; requests for as many are refused until then."""
    refused_until: float = 0.0
    asking: asyncio.Task[None] | None = None

    def count_usable(self, now: float) -> int:
        """Return the number of leased tokens that are still usable at `now`, a time of the monotonic clock in
        seconds.
        """
        return self.tokens if now < self.until else 0


class RateLimitedRequest(Protocol):
    """Part of a request that rate limits need: its caller, and headers of its answer."""

    @property
    def caller(self) -> ApiCaller: ...

    def send_with_answer(self, name: str, value: str) -> None: ...


class RunRateLimiter:
    """Rate limits of run requests at one gateway."""

    def __init__(self, broker: Broker, settings: GatewaySettings) -> None:
        self._broker = broker
        self._per_key = read_rate(settings.rate_per_key, settings.rate_per_key_burst)
        self._per_workflow = read_rate(settings.rate_per_workflow, settings.rate_per_workflow_burst)
        self._leases: OrderedDict[str, TokenLease] = OrderedDict()
        self._demands: GroupCommit[TokenDemand, TokenGrant] = GroupCommit(self._take_tokens)
        self._own = LocalTokenBuckets()
        self._away_until = 0.0

    async def take(
        self,
        request: RateLimitedRequest,
        workflow_id: str | None = None,
        *,
        key: str | None = None,
        count: int = 1,
        also: Sequence[RateLimit] = (),
    ) -> None:
        """Take tokens for `count` runs from the rate limits of a request, and add rate limit headers to its answer;
        raises a 429 error beyond a limit, and then takes none.

        `key` is the id of the sender for the limit of each sender: None means the API key of the caller, and "" no such
        limit. `workflow_id` adds the limit of a workflow; pass it only for callers who may run it. `also` adds limits
        of the route.
        """
        limits = list(also)
        if self._per_key is not None and (sender_key := request.caller.key_id if key is None else key):
            limits.append(RateLimit("key", f"key:{sender_key}", self._per_key))
        if workflow_id is not None:
            limits += self.of_workflow(workflow_id)
        if not limits:
            return
        try:
            await self.spend(limits, count)
        finally:
            for name, value in self._headers(limits).items():
                request.send_with_answer(name, value)

    def of_workflow(self, workflow_id: str) -> Sequence[RateLimit]:
        """Return the rate limit of a workflow, for all callers together, as a list; empty if none is configured."""
        if self._per_workflow is None:
            return ()
        return (RateLimit("workflow", f"workflow:{workflow_id}", self._per_workflow),)

    async def spend(self, limits: Sequence[RateLimit], count: int = 1) -> None:
        """Take `count` tokens of each limit, without headers in the answer; raises a 429 error if one lacks them, and
        then takes none.

        Tokens are leased from Redis for half a second; without Redis each process counts alone.
        """
        pairs = [(limit, self._lease(limit)) for limit in limits]
        while short := [pair for pair in pairs if pair[1].count_usable(monotonic()) < count]:
            for limit, lease in short:
                if count >= lease.refused and (seconds := lease.refused_until - monotonic()) > 0:
                    raise _refuse_rate(limit, seconds)
            await asyncio.gather(*(self._lease_more(limit, lease, count) for limit, lease in short))
        for _, lease in pairs:
            lease.tokens -= count
            lease.spent += count

    async def drain(self) -> None:
        """Wait until Redis has answered the requests for tokens that are in progress."""
        await self._demands.drain()

    def _lease(self, limit: RateLimit) -> TokenLease:
        """Return the lease of a limit's token bucket: tokens that this process has taken in advance.

        A new lease has no tokens yet, and assumes a full bucket (`left`). The 20,000 last used ones are kept.
        """
        lease = self._leases.get(limit.bucket)
        if lease is None:
            lease = self._leases[limit.bucket] = TokenLease(left=limit.rate.burst)
        self._leases.move_to_end(limit.bucket)
        if len(self._leases) > MAX_LEASES:
            self._leases.popitem(last=False)
        return lease

    def _headers(self, limits: Sequence[RateLimit]) -> Mapping[str, str]:
        """Return the headers `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10) for
        the state of these limits.
        """
        policies, standings = [], []
        for limit in limits:
            rate, lease = limit.rate, self._lease(limit)
            window = max(math.ceil(rate.burst / rate.per_second), 1)
            left = min(max(lease.left + lease.count_usable(monotonic()), 0), rate.burst)
            full = math.ceil((rate.burst - left) / rate.per_second)
            policies.append(f'"{limit.policy}";q={rate.burst};w={window}')
            standings.append(f'"{limit.policy}";r={left};t={full}')
        return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(standings)}

    # ── token leases ────────────────────────────────────────────────────────────────────────────────────────

    async def _lease_more(self, limit: RateLimit, lease: TokenLease, count: int) -> None:
        """Lease more tokens of a limit from Redis, and wait for them; one request serves all callers that wait."""
        lease.awaited += count
        try:
            if lease.asking is None:
                lease.asking = asyncio.create_task(self._lease_tokens(limit, lease, count))
            await asyncio.shield(lease.asking)
        finally:
            lease.awaited -= count

    async def _lease_tokens(self, limit: RateLimit, lease: TokenLease, count: int) -> None:
        """Ask Redis for the tokens that callers wait for and some in advance, and store the grant or refusal
        in the lease.
        """
        try:
            now = monotonic()
            ahead = _count_advance_tokens(limit.rate, lease, now)
            wanted = max(lease.awaited, count)
            grant = await self._demands.submit(TokenDemand(limit.bucket, limit.rate, count, wanted, ahead))
            lease.left, lease.spent = grant.left, 0
            if grant.tokens:
                lease.tokens = lease.count_usable(now) + grant.tokens
                lease.until = now + LEASE_SECONDS
                lease.refused_until = 0.0
            else:
                lease.refused, lease.refused_until = count, monotonic() + grant.wait_seconds
        finally:
            lease.asking = None

    async def _take_tokens(self, batch: Sequence[TokenDemand]) -> Sequence[TokenGrant]:
        """Return the grants for demands of tokens from Redis; for five seconds after a failure, from this
        process alone.
        """
        if monotonic() >= self._away_until:
            try:
                async with asyncio.timeout(ASK_SECONDS):
                    return await self._broker.take_tokens(batch)
            except (BrokerUnavailable, TimeoutError) as error:
                self._away_until = monotonic() + AWAY_SECONDS
                log.warning("rate limits counted by this process alone", reason=str(error))
        return [self._own.take(demand, monotonic()) for demand in batch]


def read_rate(per_second: float, burst: int | None) -> BucketRate | None:
    """Return the rate of the settings, in requests per second; None for 0, which means no limit.

    The burst is the number of requests at once; None means two seconds of requests.
    """
    if not per_second:
        return None
    return BucketRate(per_second, burst or math.ceil(2 * per_second))


def _count_advance_tokens(rate: BucketRate, lease: TokenLease, now: float) -> int:
    """Return the number of tokens to lease in advance: as many as were used recently, twice as many if they
    ran out early.

    At most half a second of the rate; 0 if the last lease is long over.
    """
    if now >= lease.until + LEASE_SECONDS:
        return 0
    expected = lease.spent if now >= lease.until else 2 * lease.spent
    return min(expected, int(rate.per_second * LEASE_SECONDS))


def _refuse_rate(limit: RateLimit, seconds: float) -> ApiError:
    """Return the 429 error for an exceeded rate limit, to be repeated after `seconds`."""
    rate = limit.rate
    message = (
        f"More than {rate.per_second:g} requests a second, after {rate.burst:,} at once: try again later"
    )
    return ApiError(429, "rate-limited", message, retry_after_seconds=max(math.ceil(seconds), 1))


class BacklogCount(Struct):
    """Known size and trend of one backlog."""

    counted: int | None = None
    """Number of rows at the last count."""
    added: int = 0
    """Runs that this gateway has accepted since the last count."""
    counted_at: float = 0.0
    fresh_until: float = 0.0
    begun_per_second: float = 0.0
    counting: asyncio.Task[None] | None = None

    @property
    def size(self) -> int:
        """Known size: the last count (0 before the first), and the runs accepted here since."""
        return (self.counted or 0) + self.added

    def lacks_capacity(self, count: int, limit: int) -> bool:
        """Return whether `count` more runs, added to the known size, would exceed the limit."""
        return self.size + count > limit

    def recount(self, found: int, *, added_before: int, began: float, ended: float) -> None:
        """Store a count `found` of the backlog, and update the speed at which runs begin, in runs per second.

        `added_before` runs were added here before the count began; times are monotonic seconds. A slow count
        stays valid for longer.
        """
        if self.counted is not None:
            begun = max(self.counted + added_before - found, 0)
            self.begun_per_second = begun / max(began - self.counted_at, FRESH_SECONDS)
        self.counted = found
        self.added -= added_before
        self.counted_at = began
        self.fresh_until = ended + max(FRESH_SECONDS, COUNTING_SHARE * (ended - began))

    def retry_seconds(self, count: int, limit: int) -> int:
        """Return the estimated seconds until `count` more runs fit the limit, from the recent speed of the backlog.

        From one to 60; five if the speed is not known.
        """
        if not self.begun_per_second:
            return UNKNOWN_RETRY_SECONDS
        seconds = math.ceil((self.size + count - limit) / self.begun_per_second)
        return min(max(seconds, 1), errors.MAX_RETRY_SECONDS)


class BacklogLimits:
    """Backlog limits for the runs that one gateway accepts."""

    def __init__(self, database: Database, settings: GatewaySettings) -> None:
        self._database = database
        self._per_workflow = settings.max_backlog_per_workflow
        self._per_organization = settings.max_backlog_per_organization
        self._tallies: OrderedDict[str, BacklogCount] = OrderedDict()
        self._counting: set[asyncio.Task[None]] = set()

    async def require_capacity(self, organization_id: str, workflow_id: str, count: int = 1) -> None:
        """Reserve `count` runs in the backlogs of a workflow and its organization; raises a 429 error with a delay if
        either is full.

        Then nothing is reserved. Reserved runs count until the next count of the stored ones, about a second later;
        other gateways don't see them, so limits may be exceeded a little. While the database is unavailable, the last
        counts are used.
        """
        organization = self._tally(organization_id)
        whole = self._per_organization

        async def count_organization(connection: AsyncConnection) -> int:
            return await backlog.count_organization_backlog(connection, organization_id, at_most=whole + 1)

        await self._refresh(organization, count, whole, count_organization)
        if organization.lacks_capacity(count, whole):
            raise errors.queue_full("the organization", whole, organization.retry_seconds(count, whole))
        workflow = self._tallies.get(workflow_id)
        if organization.lacks_capacity(
            count, self._per_workflow
        ):  # otherwise no workflow of the organization can exceed its limit
            workflow = await self._require_workflow_capacity(organization_id, workflow_id, count)
        organization.added += count
        if workflow is not None:
            workflow.added += count

    async def close(self) -> None:
        """Wait for the queries in progress that count backlogs."""
        await asyncio.gather(*self._counting, return_exceptions=True)

    async def _require_workflow_capacity(
        self, organization_id: str, workflow_id: str, count: int
    ) -> BacklogCount:
        """Return the backlog of a workflow if it has capacity for `count` runs, without a reservation; raises
        a 429 error otherwise.
        """
        workflow = self._tally(workflow_id)
        limit = self._per_workflow

        async def count_workflow(connection: AsyncConnection) -> int:
            return await backlog.count_workflow_backlog(
                connection, organization_id, workflow_id, at_most=limit + 1
            )

        await self._refresh(workflow, count, limit, count_workflow)
        if workflow.lacks_capacity(count, limit):
            raise errors.queue_full("the workflow", limit, workflow.retry_seconds(count, limit))
        return workflow

    def _tally(self, key: str) -> BacklogCount:
        """Return the counts of a workflow's or organization's backlog by its id, new ones at first; the
        20,000 last used are kept.
        """
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = BacklogCount()
        self._tallies.move_to_end(key)
        if len(self._tallies) > MAX_TALLIES:
            self._tallies.popitem(last=False)
        return tally

    async def _refresh(
        self,
        tally: BacklogCount,
        count: int,
        limit: int,
        find: Callable[[AsyncConnection], Awaitable[int]],
    ) -> None:
        """Start a count of a backlog by `find` in the background if the last one is outdated.

        Wait for it only if there was no count yet, or if `count` more runs would exceed the limit.
        """
        if tally.counting is None and monotonic() >= tally.fresh_until:
            tally.counting = asyncio.create_task(self._count(tally, find))
            self._counting.add(tally.counting)
            tally.counting.add_done_callback(self._counting.discard)
        if tally.counting is not None and (tally.counted is None or tally.lacks_capacity(count, limit)):
            await asyncio.shield(tally.counting)

    async def _count(self, tally: BacklogCount, find: Callable[[AsyncConnection], Awaitable[int]]) -> None:
        """Count a backlog by `find` and store the count; if the database is unavailable, keep the earlier one
        for a second.
        """
        began, added = monotonic(), tally.added
        try:
            async with self._database.read() as connection:
                found = await find(connection)
            tally.recount(found, added_before=added, began=began, ended=monotonic())
        except DatabaseUnavailable as error:
            # The insertion of the run reports the outage anyway.
            log.debug("backlog not counted", error=str(error))
            tally.fresh_until = monotonic() + FRESH_SECONDS
        finally:
            tally.counting = None
