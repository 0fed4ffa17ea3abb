"""Language models for the nodes of a process: lookup, call and cost."""

from __future__ import annotations

from math import ceil
from secrets import token_hex
from time import monotonic
from typing import TYPE_CHECKING

import msgspec

from engine.model_calls import (
    OVERHEAD_TOKENS,
    CalledModel,
    ChatRequest,
    FailedModelCall,
    ModelCallFailed,
    ModelReply,
    ModelReservation,
    ModelSettlement,
    NodeSpending,
    estimate_input_tokens,
)
from engine.model_prices import compute_cost, compute_most_cost
from engine.run_errors import NodeError
from nodes.ai import json_tools
from nodes.ai.model_client import RATE_LIMITED, ModelClient, open_model_outbound
from nodes.ai.model_connection import ECHO_MODEL, ECHO_MODEL_ID, ModelConnection, ModelConnections
from nodes.ai.model_pacing import ModelPacer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from engine.model_prices import ModelPrice
    from engine.services import RunCaller
    from nodes.ai.model_ledger import ModelLedger
    from nodes.ai.model_pacing import AdmittedCall
    from nodes.outbound_http import IpNetwork


class ModelCaller:
    """Implements `engine.services.ModelService`."""

    def __init__(
        self, connections: ModelConnections, networks: Sequence[IpNetwork], hosts: Collection[str]
    ) -> None:
        self._connections = connections
        self._outbound = open_model_outbound(networks, hosts)
        self._client = ModelClient(self._outbound)
        self._pacer = ModelPacer()

    async def complete(
        self,
        caller: RunCaller,
        model_id: str,
        request: ChatRequest,
        *,
        idempotency_key: str,
        spending: NodeSpending,
        on_text: Callable[[str], None] | None = None,
    ) -> ModelReply:
        """Ask a model once, and return its answer with its cost, which is None without a price.

        The highest possible cost is reserved before, for each call anew, even if it repeats the `idempotency_key` of an
        earlier one. The reservation, in the budgets of the node in `spending`, its run and the month, becomes the real
        cost with the answer, is released if the provider refuses the call, and stays if the provider may bill the call.
        The answer is no longer than the model's own maximum. `on_text` gets the text while it is written, but nothing
        if the model can't call tools and the request is translated for it.

        Raises `ModelCallFailed`, also before the time that the provider has named after an earlier call, and if the
        limits of the model don't admit the call within five seconds; `NodeError` for a model that the caller may not
        use, a budget that doesn't suffice, and a budget of costs if the price is unknown.
        """
        if model_id == ECHO_MODEL_ID:
            answer = await self._client.complete(
                ECHO_MODEL, request, idempotency_key=idempotency_key, on_text=on_text
            )
            return ModelReply(answer, 0, CalledModel(ECHO_MODEL.provider, ECHO_MODEL_ID))
        model = await self._connections.find(caller, model_id)
        if model.max_output_tokens is not None and model.max_output_tokens < request.max_tokens:
            request = msgspec.structs.replace(request, max_tokens=model.max_output_tokens)
        _require_unblocked(model)
        is_translated = json_tools.is_needed(model, request)
        sent = json_tools.translate_request(request) if is_translated else request
        # A tool of an agent repeats a call under its key after a kill, and both calls are charged.
        reservation = _build_reservation(model, sent, f"{idempotency_key}#{token_hex(4)}", spending)
        async with self._pacer.admit(model, reservation.tokens) as admitted:
            shown = None if is_translated else on_text
            reply = await self._call(caller, model, sent, idempotency_key, reservation, admitted, shown)
        if not is_translated:
            return reply
        return msgspec.structs.replace(reply, answer=json_tools.translate_answer(reply.answer, request))

    async def read_price(self, caller: RunCaller, model_id: str) -> ModelPrice | None:
        """Return the current price of a model; None if the price is unknown.

        Raises `NodeError` for a model that the caller may not use.
        """
        if model_id == ECHO_MODEL_ID:
            return ECHO_MODEL.price
        return (await self._connections.find(caller, model_id)).price

    async def _call(
        self,
        caller: RunCaller,
        model: ModelConnection,
        request: ChatRequest,
        idempotency_key: str,
        reservation: ModelReservation,
        admitted: AdmittedCall,
        on_text: Callable[[str], None] | None,
    ) -> ModelReply:
        """Reserve the cost of an admitted call, make it, and settle the cost; release it if the failed call is not
        billed.

        A failure is counted, and after a rate limit with a time, the model is blocked until then. Raises
        `ModelCallFailed`, and `NodeError` for a budget that doesn't suffice.
        """
        ledger, charge_key = self._connections.ledger, reservation.key
        is_reserved = await _reserve(ledger, caller, reservation)
        began = monotonic()
        try:
            answer = await self._client.complete(
                model, request, idempotency_key=idempotency_key, on_text=on_text
            )
        except ModelCallFailed as failure:
            failure.called = CalledModel(model.provider, model.vendor_model_id)
            if is_reserved and not failure.may_be_billed:
                await ledger.release(caller, charge_key)
            if failure.code == RATE_LIMITED and failure.retry_after_seconds:
                await self._connections.block(caller, model.id, failure.retry_after_seconds)
            await ledger.count_failure(caller, FailedModelCall(model.id, failure.code))
            raise
        milliseconds = round((monotonic() - began) * 1_000)
        admitted.note_tokens(answer.usage.input_tokens + answer.usage.output_tokens)
        cost = None if model.price is None else compute_cost(answer.usage, model.price)
        settlement = ModelSettlement(charge_key, reservation.node, model.id, answer.usage, cost, milliseconds)
        await ledger.settle(caller, settlement, is_reserved=is_reserved)
        return ModelReply(answer, cost, CalledModel(model.provider, model.vendor_model_id))

    async def close(self) -> None:
        """Close the connections to providers, and store the costs that are not stored yet."""
        await self._outbound.close()
        await self._connections.ledger.close()


async def _reserve(ledger: ModelLedger, caller: RunCaller, reservation: ModelReservation) -> bool:
    """Reserve the highest possible cost of a call; return whether a budget may count the call, as `ModelLedger.reserve`
    does.

    Raises `NodeError` if a budget doesn't suffice, `ModelCallFailed` if the run has to wait for the next month.
    """
    try:
        return await ledger.reserve(caller, reservation)
    except NodeError as error:
        if error.retry_after_seconds is None:
            raise
        raise ModelCallFailed(
            error.message,
            code=error.code,
            retryable=error.retryable,
            can_fall_back=False,
            retry_after_seconds=error.retry_after_seconds,
        ) from error


def _require_unblocked(model: ModelConnection) -> None:
    """Raise `ModelCallFailed`, as for a rate limit, if the provider accepts no calls yet."""
    if model.blocked_seconds > 0:
        raise ModelCallFailed(
            f"The provider accepts calls again in {ceil(model.blocked_seconds):,} s",
            code=RATE_LIMITED,
            retryable=True,
            can_fall_back=True,
            retry_after_seconds=model.blocked_seconds,
        )


def _build_reservation(
    model: ModelConnection, request: ChatRequest, key: str, spending: NodeSpending
) -> ModelReservation:
    """Return the reservation, under the charge key `key`, of the highest possible cost of a call: no input from a
    cache, and the longest answer.
    """
    input_tokens = estimate_input_tokens(request) + OVERHEAD_TOKENS
    price = model.price
    cost = None if price is None else compute_most_cost(input_tokens, request.max_tokens, price)
    tokens = input_tokens + request.max_tokens
    return ModelReservation(key, spending.node, model.id, tokens, cost, spending.budget)
