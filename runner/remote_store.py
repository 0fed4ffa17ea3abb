"""Run store without a database: implements `RunStore` by calls to the gateway."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from execution.pod_api import (
    MAX_CLAIM,
    MAX_WRITES,
    SPANS_PER_PAGE,
    STEPS_PER_PAGE,
    ClaimRequest,
    ClaimResponse,
    CountResponse,
    DefinitionsRequest,
    DefinitionsResponse,
    LeaseIdentity,
    LogPositions,
    NodeAnswersResponse,
    RecordRequest,
    RecordResponse,
    ReleaseRequest,
    RenewRequest,
    RenewResponse,
    RunsRequest,
    SpansRequest,
    SpansResponse,
    StepsRequest,
    StepsResponse,
    SuspectsRequest,
    SuspectsResponse,
)
from journal.store import (
    ClaimedRun,
    ClaimQuery,
    DefinitionKey,
    ExecutionKey,
    LeaseRenewal,
    RenewalResult,
    RunWrite,
    SweepResult,
)
from models.errors import PartialCommit

if TYPE_CHECKING:
    from engine.agents.agent_steps import AgentStep
    from engine.run_records import NodeSpan
    from runner.gateway_client import GatewayClient

RECORD_SECONDS: Final = 60.0
MAX_CALL_BYTES: Final = 8_000_000
"""Size above which no further run is added to a call; a single write may be larger."""


class RemoteRunStore:
    """Run store of one event loop, over the gateway."""

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway
        self.clock = gateway.clock

    async def claim(self, claim: ClaimQuery) -> Sequence[ClaimedRun]:
        """Take pending runs of this pod's deployment through the gateway, each with a lease and fencing
        token; 50 at most.

        Also sets the clock by the answer. Raises `DatabaseUnavailable` and `CallRefused`, as all calls here do.
        """
        call = ClaimRequest(
            min(claim.limit, MAX_CLAIM), claim.lease_seconds, claim.is_trial, claim.max_isolation_losses
        )
        asked_at = time.monotonic()
        claimed = (await self._gateway.call("/claim", call, ClaimResponse)).runs
        self.clock.learn(claimed[0].claimed_at if claimed else None, asked_at)
        return claimed

    async def has_suspects(self, max_isolation_losses: int, target: str = "") -> bool:  # noqa: ARG002 - the gateway knows the deployment
        """Return whether runs of this deployment that lost several workers wait for a trial;
        see `RunStore.has_suspects`.

        `target` is ignored: the gateway knows the deployment. Raises `DatabaseUnavailable` and `CallRefused`.
        """
        call = SuspectsRequest(max_isolation_losses)
        return (await self._gateway.call("/suspects", call, SuspectsResponse)).has_suspects

    async def record(self, batch: Sequence[RunWrite], *, owner: str = "") -> frozenset[str]:  # noqa: ARG002 - the gateway knows the owner
        """Write the progress of runs in several calls; return the ids of runs that still held their token.

        Raises `PartialCommit` if some writes are not stored; see `RunStore.record`. If a call fails, the writes of
        those before it are stored. `owner` is ignored: the gateway knows the pod. Raises `DatabaseUnavailable` and
        `CallRefused`.
        """
        held: set[str] = set()
        unwritten: set[str] = set()
        for part in _split_batch(batch):
            call = RecordRequest(list(part))
            answer = await self._gateway.call("/record", call, RecordResponse, seconds=RECORD_SECONDS)
            held.update(answer.held)
            unwritten.update(answer.unwritten)
        if unwritten:
            raise PartialCommit(held, unwritten)
        return frozenset(held)

    async def renew(
        self,
        held: Sequence[LeaseRenewal],
        lease_seconds: float,
        *,
        owner: str = "",  # noqa: ARG002 - the gateway knows the owner
    ) -> Sequence[RenewalResult]:
        """Extend leases to `lease_seconds` from now through the gateway; return those still held, with
        requests to stop or cancel.

        Leases of locked rows are marked (`is_locked`), and not extended. A lease without a result is lost. Also sets
        the clock by the answer. `owner` is ignored: the gateway knows the pod. Raises `DatabaseUnavailable` and
        `CallRefused`.
        """
        leases = [LeaseIdentity(one.execution_id, one.shard, one.token) for one in held]
        asked_at = time.monotonic()
        answer = await self._gateway.call("/renew", RenewRequest(leases, lease_seconds), RenewResponse)
        self.clock.learn(answer.now, asked_at)
        renewed = [RenewalResult(execution_id, request) for execution_id, request in answer.requests.items()]
        return [
            *renewed,
            *(RenewalResult(execution_id, None, is_locked=True) for execution_id in answer.locked),
        ]

    async def definitions(self, keys: Sequence[DefinitionKey]) -> dict[DefinitionKey, str]:
        """Return the definitions with which runs of this pod were accepted, by their keys;
        missing ones are left out.

        Raises `DatabaseUnavailable` and `CallRefused`.
        """
        call = DefinitionsRequest([key.hash for key in keys])
        texts = (await self._gateway.call("/definitions", call, DefinitionsResponse)).texts
        return {key: texts[key.hash] for key in keys if key.hash in texts}

    async def spans(self, keys: Sequence[ExecutionKey]) -> dict[str, list[NodeSpan]]:
        """Return the recorded spans of each run by execution id, in order; an empty list for a run without any.

        Raises `DatabaseUnavailable` and `CallRefused`.
        """
        return {key.execution_id: await self._read_spans(key.execution_id) for key in keys}

    async def _read_spans(self, execution_id: str) -> list[NodeSpan]:
        """Return all recorded spans of a run, with candidates of a replay, read page by page.

        Raises `DatabaseUnavailable` and `CallRefused`.
        """
        found: list[NodeSpan] = []
        while True:
            after = found[-1].sequence if found else 0
            page = (
                await self._gateway.call(
                    "/spans", SpansRequest(execution_id, after, reads_candidates=True), SpansResponse
                )
            ).spans
            found.extend(page)
            if len(page) < SPANS_PER_PAGE:
                return found

    async def steps(self, keys: Sequence[ExecutionKey]) -> dict[str, list[AgentStep]]:
        """Return the steps of unfinished agents by execution id, in the order of their numbers;
        runs without any are left out.

        Raises `DatabaseUnavailable` and `CallRefused`.
        """
        found = {key.execution_id: await self._read_steps(key.execution_id) for key in keys}
        return {execution_id: steps for execution_id, steps in found.items() if steps}

    async def _read_steps(self, execution_id: str) -> list[AgentStep]:
        """Return all steps of the unfinished agents of a run, in the order of their numbers.

        Raises `DatabaseUnavailable` and `CallRefused`.
        """
        found: list[AgentStep] = []
        while True:
            after = found[-1].sequence if found else 0
            request = StepsRequest(execution_id, after)
            page = (await self._gateway.call("/steps", request, StepsResponse)).steps
            found.extend(page)
            if len(page) < STEPS_PER_PAGE:
                return sorted(found, key=lambda step: step.number)

    async def last_log_lines(self, keys: Sequence[ExecutionKey]) -> dict[str, int]:
        """Return the highest number of each run's log lines by execution id; runs without any are left out.

        Raises `DatabaseUnavailable` and `CallRefused`.
        """
        return dict((await self._gateway.call("/log-ends", _runs_request(keys), LogPositions)).last_lines)

    async def answers(self, keys: Sequence[ExecutionKey]) -> dict[str, dict[tuple[str, str], bytes]]:
        """Return the wait answers of nodes by execution id, then by node id and iteration;
        runs without any are left out.

        Raises `DatabaseUnavailable` and `CallRefused`.
        """
        found: dict[str, dict[tuple[str, str], bytes]] = {}
        for one in (await self._gateway.call("/answers", _runs_request(keys), NodeAnswersResponse)).answers:
            found.setdefault(one.execution_id, {})[one.node_id, one.iteration] = one.payload
        return found

    async def promote_due(self) -> int:
        """Make runs of this deployment pending whose wait or delay is over, through the gateway; return their
        number.

        Raises `DatabaseUnavailable` and `CallRefused`.
        """
        return (await self._gateway.call("/promote", None, CountResponse)).count

    async def sweep(self, limit: int) -> SweepResult:  # noqa: ARG002 - the protocol's signature
        """Return an empty result, without a call: workers and the gateway sweep for pods."""
        return SweepResult(0, {}, 0, has_pending=False)

    async def release(self, owner: str, held: Sequence[str]) -> int:  # noqa: ARG002 - the gateway knows the owner
        """Make the runs that this pod holds pending, except those in `held`, through the gateway; return
        their number.

        See `RunStore.release`. `owner` is ignored: the gateway knows the pod. Raises `DatabaseUnavailable` and
        `CallRefused`.
        """
        return (await self._gateway.call("/release", ReleaseRequest(list(held)), CountResponse)).count

    async def for_thread(self) -> RemoteRunStore:
        """Return a store with connections of its own for the running event loop,
        that of another thread than this store's.
        """
        return RemoteRunStore(self._gateway.for_loop())

    async def close(self) -> None:
        """Close the connections to the gateway."""
        await self._gateway.close()


def _runs_request(keys: Sequence[ExecutionKey]) -> RunsRequest:
    return RunsRequest([key.execution_id for key in keys])


def _split_batch(batch: Sequence[RunWrite]) -> Iterator[Sequence[RunWrite]]:
    """Yield the writes of runs in parts that each fit into one call: 200 writes, and about 8 MB.

    A larger write is a part of its own.
    """
    part: list[RunWrite] = []
    size = 0
    for write in batch:
        written = len(msgspec.json.encode(write)) if write.spans or write.steps else 0
        if part and (size + written > MAX_CALL_BYTES or len(part) == MAX_WRITES):
            yield part
            part, size = [], 0
        part.append(write)
        size += written
    if part:
        yield part
