"""Language models that are loaded with the first call: most processes never call one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from engine.model_calls import ChatRequest, ModelReply, NodeSpending
    from engine.model_prices import ModelPrice
    from engine.services import RunCaller
    from nodes.ai.model_caller import ModelCaller
    from nodes.ai.model_connection import ModelConnections
    from nodes.outbound_http import IpNetwork


class LazyModels:
    """Implements `engine.services.ModelService`."""

    def __init__(
        self,
        open_connections: Callable[[], ModelConnections],
        networks: Sequence[IpNetwork],
        hosts: Collection[str],
    ) -> None:
        """`open_connections` returns the lookup of models, and is called once, at the first use of a model.

        `networks` and `hosts` are those of private providers that the operator allows.
        """
        self._open_connections = open_connections
        self._networks = networks
        self._hosts = hosts
        self._caller: ModelCaller | None = None

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
        """Ask a model once, as `ModelCaller` does; raises `NodeError`."""
        return await self._open().complete(
            caller, model_id, request, idempotency_key=idempotency_key, spending=spending, on_text=on_text
        )

    async def read_price(self, caller: RunCaller, model_id: str) -> ModelPrice | None:
        """Return the current price of a model; None if the price is unknown. Raises `NodeError` for a model that the
        caller may not use.
        """
        return await self._open().read_price(caller, model_id)

    def _open(self) -> ModelCaller:
        """Return the `ModelCaller`, which is imported and created at the first call."""
        if self._caller is None:
            from nodes.ai.model_caller import ModelCaller  # noqa: PLC0415 - see the module

            self._caller = ModelCaller(self._open_connections(), self._networks, self._hosts)
        return self._caller

    async def close(self) -> None:
        """Close the connections to providers and store the costs that are not stored yet; does nothing if no model was
        used.
        """
        if self._caller is not None:
            await self._caller.close()
