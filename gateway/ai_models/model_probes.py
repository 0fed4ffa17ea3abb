"""Tests of language models: real calls that show what a model can do, instead of believing a form."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog
from sqlalchemy import update
from sqlmodel import col

from engine.model_calls import ChatMessage, ChatRequest, MessageRole, ModelCallFailed, ToolDescription
from engine.run_errors import NodeError
from gateway.ai_models.model_shapes import CapabilitiesShape
from gateway.http import limits
from models import ids
from models.ai_model import AiModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from execution.stored_models import StoredModels
    from gateway.data_sources.data_source_probes import DataSourceProber
    from models.database import Database
    from models.settings import ServerSettings
    from nodes.ai.model_client import ModelClient
    from nodes.ai.model_connection import ModelConnection

log = structlog.get_logger()

PROBE_TOKENS: Final = 256
CITY_SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
QUESTION: Final = "Which city is the capital of Norway?"


@dataclass(frozen=True, slots=True)
class ModelProbe:
    """Result of the test of a model."""

    is_ok: bool
    message: str
    duration_milliseconds: int
    capabilities: CapabilitiesShape | None = None


class ModelProber:
    """Calls models for tests, and stores what they can do."""

    def __init__(
        self, database: Database, models: StoredModels, probes: DataSourceProber, settings: ServerSettings
    ) -> None:
        self._database = database
        self._models = models
        self._probes = probes
        self._settings = settings

    async def probe(self, model: AiModel) -> ModelProbe:
        """Test a model; access was checked before. A model that does not answer is a result.

        Raises a 429 error after too many tests of the organization within a minute.
        """
        self._probes.count_test(model.organization_id)
        began = monotonic()
        try:
            async with asyncio.timeout(limits.MODEL_TEST_SECONDS):
                found = await self._call(await self._models.connect(model))
            is_ok, message = True, "The model answers"
        except NodeError as error:
            found, is_ok, message = None, False, error.message
        except TimeoutError:
            found, is_ok = None, False
            message = f"No answer within {limits.MODEL_TEST_SECONDS} seconds"
        milliseconds = round((monotonic() - began) * 1000)
        log.info("model tested", model_id=model.id, is_ok=is_ok, duration_milliseconds=milliseconds)
        return ModelProbe(is_ok, message, milliseconds, found)

    async def store(self, model: AiModel, capabilities: CapabilitiesShape) -> None:
        """Store the abilities that a test has seen, unless the model has been changed since.

        Its answers show that the provider accepts calls again, whatever time it has named before.
        """
        values = {
            "capabilities": msgspec.to_builtins(capabilities),
            "tested_at": self._database.clock.now(),
            "blocked_until": None,
        }

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(
                update(AiModel)
                .where(col(AiModel.id) == model.id, col(AiModel.revision) == model.revision)
                .values(values)
            )

        await self._database.transaction(work)

    async def _call(self, model: ModelConnection) -> CapabilitiesShape:
        """Call a model three times, and return its abilities; raises `NodeError` if it doesn't answer at all."""
        from nodes.ai.model_client import ModelClient, open_model_outbound  # noqa: PLC0415 - loaded with the first test

        outbound = open_model_outbound(self._settings.outbound_allowed_networks, self._settings.model_hosts)
        client = ModelClient(outbound)
        try:
            await client.complete(model, _build_request(), idempotency_key=ids.new_id("test"))
            return CapabilitiesShape(
                tools=await _calls_tools(client, model), json_schema=await _follows_schemas(client, model)
            )
        finally:
            await outbound.close()


async def _calls_tools(client: ModelClient, model: ModelConnection) -> bool:
    """Return whether a model, asked to use a tool, calls it with valid arguments; this makes one call.

    Raises `ModelCallFailed` for a temporary failure.
    """
    tool = ToolDescription("report_city", "Reports the city that answers the question.", CITY_SCHEMA)
    request = msgspec.structs.replace(_build_request(), tools=(tool,), forced_tool=tool.name)
    try:
        answer = await client.complete(model, request, idempotency_key=ids.new_id("test"))
    except ModelCallFailed as failure:
        if failure.retryable:
            raise
        return False
    return any(
        call.name == tool.name and isinstance((call.arguments or {}).get("city"), str)
        for call in answer.tool_calls
    )


async def _follows_schemas(client: ModelClient, model: ModelConnection) -> bool:
    """Return whether a model answers by a JSON Schema that its provider gets as such; this makes one call.

    Raises `ModelCallFailed` for a temporary failure.
    """
    from nodes.ai import structured_answers  # noqa: PLC0415 - loaded with the first test

    request = msgspec.structs.replace(_build_request(), output_schema=CITY_SCHEMA)
    follower = msgspec.structs.replace(model, follows_schemas=True)
    try:
        answer = await client.complete(follower, request, idempotency_key=ids.new_id("test"))
    except ModelCallFailed as failure:
        if failure.retryable:
            raise
        return False
    return not structured_answers.read_answer(answer.text, CITY_SCHEMA).problems


def _build_request() -> ChatRequest:
    return ChatRequest((ChatMessage(MessageRole.USER, QUESTION),), PROBE_TOKENS)
