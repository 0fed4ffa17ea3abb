"""Language models for the nodes of a process: lookup, call and cost."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import msgspec

from engine.model_calls import ChatRequest, ModelCallFailed, ModelReply
from engine.model_prices import compute_cost
from nodes.ai.model_client import RATE_LIMITED, ModelClient, open_model_outbound
from nodes.ai.model_connection import ECHO_MODEL, ECHO_MODEL_ID, ModelConnections

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from engine.services import RunCaller
    from nodes.outbound_http import IpNetwork


class ModelCaller:
    """Implements `engine.services.ModelService`."""

    def __init__(
        self, connections: ModelConnections, networks: Sequence[IpNetwork], hosts: Collection[str]
    ) -> None:
        self._connections = connections
        self._outbound = open_model_outbound(networks, hosts)
        self._client = ModelClient(self._outbound)

    async def complete(
        self, caller: RunCaller, model_id: str, request: ChatRequest, *, idempotency_key: str
    ) -> ModelReply:
        """Ask a model once, and return its answer with its cost, which is None without a price.

        A model is not called before the time that its provider has named after an earlier call. Raises
        `ModelCallFailed`, and `NodeError` for a model that the caller may not use.
        """
        model = ECHO_MODEL if model_id == ECHO_MODEL_ID else await self._connections.find(caller, model_id)
        if model.max_output_tokens is not None and model.max_output_tokens < request.max_tokens:
            request = msgspec.structs.replace(request, max_tokens=model.max_output_tokens)
        if model.blocked_seconds > 0:
            raise ModelCallFailed(
                f"The provider accepts calls again in {ceil(model.blocked_seconds):,} s",
                code=RATE_LIMITED,
                retryable=True,
                can_fall_back=True,
                retry_after_seconds=model.blocked_seconds,
            )
        try:
            answer = await self._client.complete(model, request, idempotency_key=idempotency_key)
        except ModelCallFailed as failure:
            if failure.code == RATE_LIMITED and failure.retry_after_seconds:
                await self._connections.block(caller, model_id, failure.retry_after_seconds)
            raise
        return ModelReply(answer, None if model.price is None else compute_cost(answer.usage, model.price))

    async def close(self) -> None:
        """Close the connections to providers."""
        await self._outbound.close()
