"""Tests of language models: real calls that show what a model can do, instead of believing a form."""

from __future__ import annotations

import asyncio
import zlib
from base64 import b64encode
from struct import pack
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog
from msgspec import Struct
from sqlalchemy import update
from sqlmodel import col

from engine.model_calls import (
    ChatMessage,
    ChatRequest,
    MessageRole,
    ModelCallFailed,
    ProviderContent,
    ToolDescription,
)
from engine.run_errors import NodeError
from gateway.ai_models.model_shapes import CapabilitiesShape
from gateway.http import limits
from models import ids
from models.ai_model import AiModel
from models.timestamps import format_timestamp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from sqlalchemy.ext.asyncio import AsyncConnection

    from engine.model_calls import ChatAnswer
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
TWO_CITIES: Final = (
    "Report the capitals of Norway and of Sweden. Call the tool once for each of them, both at once."
)
CITY_TOOL: Final = ToolDescription("report_city", "Reports the city that answers the question.", CITY_SCHEMA)
COLOR: Final = "purple"
COLOR_QUESTION: Final = "Which color does this image have? Answer with one word."


class ModelProbe(Struct, frozen=True):
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
        """Test a model and return the result, which is not stored; a failed call is a result, not an error.

        The caller's access was checked before.
        Raises a 429 error after too many tests of the organization within a minute.
        """
        self._probes.count_test(model.organization_id)
        began = monotonic()
        deadline = began + limits.MODEL_TEST_SECONDS
        try:
            async with asyncio.timeout(limits.MODEL_TEST_SECONDS):
                connected = await self._models.connect(model)
            found = await self._call(connected, deadline)
            is_ok, message = True, _describe_abilities(found)
        except NodeError as error:
            found, is_ok, message = None, False, error.message
        except TimeoutError:
            found, is_ok = None, False
            message = f"No answer within {monotonic() - began:.0f} seconds"
        milliseconds = round((monotonic() - began) * 1000)
        log.info("model tested", model_id=model.id, is_ok=is_ok, duration_milliseconds=milliseconds)
        return ModelProbe(is_ok, message, milliseconds, found)

    async def store(self, model: AiModel, probe: ModelProbe) -> None:
        """Store the result of a test, unless the model has been changed since; if it was answered, also the abilities.

        An answered test ends a block by the provider. Abilities for which it had no answer keep their earlier values.
        """
        now = self._database.clock.now()
        values: dict[str, Any] = {
            "last_test": {
                "at": format_timestamp(now),
                "ok": probe.is_ok,
                "message": probe.message,
                "durationMs": probe.duration_milliseconds,
            }
        }
        if probe.capabilities is not None:
            seen = msgspec.to_builtins(probe.capabilities)
            looked_at = {name: ability for name, ability in seen.items() if ability is not None}
            seen |= (model.capabilities or {}) | looked_at
            values |= {"capabilities": seen, "tested_at": now, "blocked_until": None}

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(
                update(AiModel)
                .where(col(AiModel.id) == model.id, col(AiModel.revision) == model.revision)
                .values(values)
            )

        await self._database.transaction(work)

    async def _call(self, model: ModelConnection, deadline: float) -> CapabilitiesShape:
        """Call a model up to six times until a time by `monotonic`, and return its abilities.

        The first call may take half of the time, each further one an equal share of the rest; an ability is None if its
        call took longer. Raises `NodeError` if the first call fails, `TimeoutError` if it takes too long, and the
        `ModelCallFailed` of further calls.
        """
        from nodes.ai.model_client import ModelClient, open_model_outbound  # noqa: PLC0415 - loaded with the first test

        outbound = open_model_outbound(self._settings.outbound_allowed_networks, self._settings.model_hosts)
        client = ModelClient(outbound)
        try:
            async with asyncio.timeout(_share_time(deadline, 2)):
                answer = await client.complete(model, _build_request(), idempotency_key=ids.new_id("test"))
            calls_tools = await _try_until(_share_time(deadline, 5), _calls_tools(client, model))
            follows_schemas = await _try_until(_share_time(deadline, 4), _follows_schemas(client, model))
            json_mode = None
            if not follows_schemas:
                json_mode = await _try_until(_share_time(deadline, 3), _answers_in_json_mode(client, model))
            return CapabilitiesShape(
                tools=calls_tools,
                json_schema=follows_schemas,
                json_mode=json_mode,
                streaming=answer.is_streamed,
                vision=await _try_until(_share_time(deadline, 2), _sees_images(client, model)),
                parallel_tools=calls_tools
                and await _try_until(_share_time(deadline, 1), _calls_tools_at_once(client, model)),
            )
        finally:
            await outbound.close()


def _share_time(deadline: float, calls: int) -> float:
    """Return the seconds for each of a number of calls in the time left until `deadline` by `monotonic`; 0 after it."""
    return max(deadline - monotonic(), 0.0) / calls


async def _try_until(seconds: float, probe: Awaitable[bool]) -> bool | None:
    """Return the result of a probe; None, and the probe is canceled, if it takes longer."""
    try:
        async with asyncio.timeout(seconds):
            return await probe
    except TimeoutError:
        return None


def _describe_abilities(found: CapabilitiesShape) -> str:
    """Return the message of a test that was answered, with the abilities that it had no time to look at."""
    unneeded = {"jsonMode"} if found.json_schema else set()
    missing = [
        name
        for name, ability in msgspec.to_builtins(found).items()
        if ability is None and name not in unneeded
    ]
    untested = f", but had no time to show: {', '.join(missing)}" if missing else ""
    return f"The model answers{untested}"


async def _calls_tools(client: ModelClient, model: ModelConnection) -> bool:
    """Return whether a model, asked to use a tool, calls it with valid arguments; False also if the call fails for
    good, as when the provider refuses the request.

    It makes one call. Raises `ModelCallFailed` for a temporary failure.
    """
    request = msgspec.structs.replace(_build_request(), tools=(CITY_TOOL,), forced_tool=CITY_TOOL.name)
    return bool(_list_cities(await _ask(client, model, request)))


async def _calls_tools_at_once(client: ModelClient, model: ModelConnection) -> bool:
    """Return whether a model, asked for two uses of a tool, calls it twice in one answer; False also if the call fails
    for good.

    It makes one call. Raises `ModelCallFailed` for a temporary failure.
    """
    request = msgspec.structs.replace(_build_request(TWO_CITIES), tools=(CITY_TOOL,))
    return len(set(_list_cities(await _ask(client, model, request)))) > 1


async def _follows_schemas(client: ModelClient, model: ModelConnection) -> bool:
    """Return whether a model's answer fits a JSON Schema that the request has as a parameter; False also if the call
    fails for good.

    It makes one call. Raises `ModelCallFailed` for a temporary failure.
    """
    by_schema = msgspec.structs.replace(model, follows_schemas=True)
    return _fits_city_schema(await _ask(client, by_schema, _build_city_request()))


async def _answers_in_json_mode(client: ModelClient, model: ModelConnection) -> bool:
    """Return whether a model's answer in its provider's JSON mode fits a schema that the prompt describes; False also
    if the call fails.

    False without a call if the protocol has no such mode. Raises `ModelCallFailed` for a rate limit alone.
    """
    from nodes.ai.model_client import PROTOCOLS  # noqa: PLC0415 - loaded with the first test

    if PROTOCOLS[model.provider].JSON_MODE is None:
        return False
    in_json_mode = msgspec.structs.replace(model, follows_schemas=False, has_json_mode=True)
    return _fits_city_schema(await _ask_for_optional_ability(client, in_json_mode, _build_city_request()))


async def _sees_images(client: ModelClient, model: ModelConnection) -> bool:
    """Return whether a model names the color of a purple image in one call; False also if the call fails.

    Raises `ModelCallFailed` for a rate limit alone.
    """
    from nodes.ai.model_client import PROTOCOLS  # noqa: PLC0415 - loaded with the first test

    parts = PROTOCOLS[model.provider].build_image_question(COLOR_QUESTION, b64encode(_draw_image()).decode())
    content = ProviderContent(model.id, parts)
    message = ChatMessage(MessageRole.USER, COLOR_QUESTION, provider_content=content)
    answer = await _ask_for_optional_ability(client, model, ChatRequest((message,), PROBE_TOKENS))
    return answer is not None and COLOR in answer.text.lower()


async def _ask_for_optional_ability(
    client: ModelClient, model: ModelConnection, request: ChatRequest
) -> ChatAnswer | None:
    """Return the answer to a request that many servers don't support; None if the call fails.

    Servers refuse it with any status, 500 among them. Raises `ModelCallFailed` for a rate limit alone.
    """
    from nodes.ai.model_client import RATE_LIMITED  # noqa: PLC0415 - loaded with the first test

    try:
        return await _ask(client, model, request)
    except ModelCallFailed as failure:
        if failure.code == RATE_LIMITED:
            raise
        return None


async def _ask(client: ModelClient, model: ModelConnection, request: ChatRequest) -> ChatAnswer | None:
    """Return the answer to a request; None if the call fails for good, as when the provider refuses the request.

    Raises `ModelCallFailed` for a temporary failure, which another attempt might avoid.
    """
    try:
        return await client.complete(model, request, idempotency_key=ids.new_id("test"))
    except ModelCallFailed as failure:
        if failure.retryable:
            raise
        return None


def _fits_city_schema(answer: ChatAnswer | None) -> bool:
    """Return whether the answer to a probe of structured output is JSON by `CITY_SCHEMA`; False without an answer."""
    from nodes.ai import structured_answers  # noqa: PLC0415 - loaded with the first test

    return answer is not None and not structured_answers.read_answer(answer.text, CITY_SCHEMA).problems


def _list_cities(answer: ChatAnswer | None) -> list[str]:
    """Return the cities that an answer reports by calls of the tool."""
    calls = () if answer is None else answer.tool_calls
    cities = [(call.arguments or {}).get("city") for call in calls if call.name == CITY_TOOL.name]
    return [city for city in cities if isinstance(city, str)]


def _draw_image() -> bytes:
    """Return a PNG image of 64 x 64 pixels, all of them purple."""
    size, row = 64, b"\0" + bytes((128, 0, 128)) * 64
    chunks = (
        (b"IHDR", pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * size)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        pack(">I", len(data)) + name + data + pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _build_request(question: str = QUESTION) -> ChatRequest:
    return ChatRequest((ChatMessage(MessageRole.USER, question),), PROBE_TOKENS)


def _build_city_request() -> ChatRequest:
    return msgspec.structs.replace(_build_request(), output_schema=CITY_SCHEMA)
