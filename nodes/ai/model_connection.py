"""Model of an organization with the address and the key of its provider, and the lookup that finds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import msgspec

from engine.model_calls import ModelProvider
from engine.model_limits import ModelLimitShare
from engine.model_prices import ModelPrice

if TYPE_CHECKING:
    from engine.services import RunCaller
    from engine.values import Json
    from nodes.ai.model_ledger import ModelLedger

ECHO_MODEL_ID = "echo"
"""Id of the built-in model that answers with the question."""


class ModelConnection(msgspec.Struct, frozen=True):
    """Model with everything that a call of it needs, the key included."""

    id: str
    provider: ModelProvider
    vendor_model_id: str = ""
    """Name of the model at its provider."""
    base_url: str = ""
    """Address below which the provider's operations are; from the data source, never from a workflow."""
    key: str = ""
    key_header: str = ""
    """Header of the key; empty for that of the provider's protocol."""
    headers: Mapping[str, str] = {}
    """Further headers of every request."""
    follows_schemas: bool = False
    """Whether a test has shown that the model answers by a JSON Schema."""
    has_json_mode: bool = False
    """Whether a test has shown that its provider restricts answers to JSON objects."""
    calls_tools: bool = False
    """Whether a test has shown that the model calls tools."""
    ignores_tools: bool = False
    """Whether a test has shown that it doesn't, so that it calls tools by answers with JSON."""
    max_output_tokens: int | None = None
    price: ModelPrice | None = None
    limits: ModelLimitShare | None = None
    """Share of this process in the limits of the model; None without limits."""
    blocked_seconds: float = 0.0
    """Time until its provider accepts calls again, as it has said after an earlier one."""

    def __repr__(self) -> str:
        return f"ModelConnection({self.id!r}, provider={self.provider.value!r})"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("id", self.id), ("provider", self.provider.value)]


def build_listing_connection(settings: Mapping[str, Json], secrets: Mapping[str, str]) -> ModelConnection:
    """Return a connection that lists the models of a provider, from valid settings and secrets of its data source."""
    return ModelConnection(
        id="",
        provider=ModelProvider(str(settings.get("provider", ModelProvider.OPENAI_COMPATIBLE))),
        base_url=str(settings["baseUrl"]),
        key=secrets.get("key", ""),
        key_header=str(settings.get("keyHeader", "")),
    )


ECHO_MODEL = ModelConnection(ECHO_MODEL_ID, ModelProvider.ECHO, price=ModelPrice("0", "0"))


class ModelConnections(Protocol):
    """Lookup of models that a caller may use, and ledger of their calls."""

    @property
    def ledger(self) -> ModelLedger:
        """Ledger in which the costs of model calls are reserved and settled."""

    async def find(self, caller: RunCaller, model_id: str) -> ModelConnection:
        """Return a model with the address and key of its provider.

        Raises `NodeError` `model-not-found` if it is missing or the caller may not use it.
        """

    async def block(self, caller: RunCaller, model_id: str, seconds: float) -> None:
        """Record that the provider of a model accepts no calls for some seconds; failures to do so are ignored."""
