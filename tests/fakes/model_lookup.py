"""Lookup of models that are served by scripted servers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import ip_network

from engine.model_calls import ModelProvider
from engine.model_prices import ModelPrice
from engine.run_errors import NodeError
from engine.services import RunCaller
from nodes.ai.model_connection import ModelConnection
from nodes.ai.model_ledger import ModelLedger
from nodes.lazy_models import LazyModels
from tests.fakes.model_ledger import MemoryLedger
from tests.fakes.model_server import KEY

PRICE = ModelPrice("1", "10")
LOOPBACK = (ip_network("127.0.0.1/32"),)


class ServedModels:
    """Lookup of models by id, each at the address of a scripted server."""

    def __init__(
        self,
        urls: Mapping[str, str],
        price: ModelPrice | None = PRICE,
        ignoring_tools: Collection[str] = (),
    ) -> None:
        """`ignoring_tools` has the ids of models that called no tool in their test."""
        self._urls = urls
        self._price = price
        self._ignoring_tools = ignoring_tools
        self.ledger = MemoryLedger()

    async def find(self, caller: RunCaller, model_id: str) -> ModelConnection:  # noqa: ARG002 - the protocol's parameters
        """Return a model at the address of its server; raises `NodeError` for an unknown id."""
        if model_id not in self._urls:
            raise NodeError(f"There is no model {model_id!r} that this run may use", code="model-not-found")
        return ModelConnection(
            model_id,
            ModelProvider.OPENAI_COMPATIBLE,
            "scripted-1",
            self._urls[model_id],
            KEY,
            follows_schemas=True,
            ignores_tools=model_id in self._ignoring_tools,
            price=self._price,
        )

    async def block(self, caller: RunCaller, model_id: str, seconds: float) -> None:
        """Do nothing: each call is sent to the server."""


class ChargedModels:
    """Lookup of served models with another ledger."""

    def __init__(self, served: ServedModels, ledger: ModelLedger) -> None:
        self._served = served
        self.ledger = ledger

    async def find(self, caller: RunCaller, model_id: str) -> ModelConnection:
        return await self._served.find(caller, model_id)

    async def block(self, caller: RunCaller, model_id: str, seconds: float) -> None:
        """Do nothing, as the served models."""


def open_served_models(
    urls: Mapping[str, str], price: ModelPrice | None = PRICE, ignoring_tools: Collection[str] = ()
) -> LazyModels:
    """Return the service of nodes that calls these models on this machine."""
    return LazyModels(lambda: ServedModels(urls, price, ignoring_tools), LOOPBACK, ())
