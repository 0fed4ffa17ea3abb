"""Endpoints of provider keys: the data sources that hold address and key of a provider of language models.

They are the data sources of the type `ai-provider`, with fields of their own in place of settings and secrets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final, TypeAlias

import msgspec
from msgspec import Meta

from gateway.ai_models import own_fields
from gateway.ai_models.own_fields import SORT, SourceResource
from gateway.data_sources import data_source_editing, data_source_rows
from gateway.data_sources.data_source_rows import StoredDataSource
from gateway.data_sources.data_source_shapes import CreateDataSource, Name, UpdateDataSource
from gateway.http import errors, limits, read_only
from gateway.http.parameters import LIMIT, OFFSET, FlagParameter
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.wire import Instant, StrictWire, WireStruct, body_of, instant, read_json
from models.data_source_types import MAX_SECRET_LENGTH, AiProviderProtocol, DataSourceType

LISTED = (LIMIT, OFFSET, SORT)
FORCE = FlagParameter("force", "Delete it even if models or workflows name it; their calls then fail.")


ApiKey: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_SECRET_LENGTH)]
BaseUrl: TypeAlias = Annotated[str, Meta(max_length=300)]
KeyHeader: TypeAlias = Annotated[str, Meta(max_length=100)]
FIELDS: Final[Mapping[str, str]] = {
    "secrets.key": "apiKey",
    "settings.baseUrl": "baseUrl",
    "settings.keyHeader": "keyHeader",
}
"""Fields of a provider key by those of its data source."""


class KeyProvider(StrEnum):
    """Provider of language models."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    MISTRAL = "mistral"
    GROQ = "groq"
    GEMINI = "gemini"
    OPENAI_COMPATIBLE = "openai-compatible"
    """Any other server with OpenAI's chat completions, such as Azure, vLLM, Ollama or llama.cpp."""


PUBLIC_URLS: Final[Mapping[KeyProvider, str]] = {
    KeyProvider.OPENAI: "https://api.openai.com/v1",
    KeyProvider.ANTHROPIC: "https://api.anthropic.com/v1",
    KeyProvider.MISTRAL: "https://api.mistral.ai/v1",
    KeyProvider.GROQ: "https://api.groq.com/openai/v1",
    KeyProvider.GEMINI: "https://generativelanguage.googleapis.com/v1beta/openai",
}


class CreateProviderKey(StrictWire):
    """Provider key to store."""

    read_only: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("id", "hasKey", "keySetAt", "organizationId", "ownerId", "createdAt", "updatedAt"), ""
        ),
        "isPublic": "PUT /api/v1/datasources/:id/visibility",
    }

    name: Name
    """Unique among the caller's data sources."""
    provider: KeyProvider
    api_key: ApiKey | None = None
    """Stored encrypted and never shown; null for servers without keys."""
    base_url: BaseUrl | None = None
    """Address of the provider; null for the public one of a provider that has one."""
    key_header: KeyHeader | None = None
    """Header of the key, such as `api-key` for Azure; null for that of the provider."""


class UpdateProviderKey(StrictWire):
    """Changes of a provider key; absent fields do not change. Another address or header requires `apiKey`."""

    read_only: ClassVar[Mapping[str, str]] = {**CreateProviderKey.read_only, "provider": ""}

    name: Name | msgspec.UnsetType = msgspec.UNSET
    api_key: ApiKey | msgspec.UnsetType = msgspec.UNSET
    """Replaces the key."""
    base_url: BaseUrl | msgspec.UnsetType = msgspec.UNSET
    key_header: KeyHeader | msgspec.UnsetType | None = msgspec.UNSET


class ProviderKeyShape(WireStruct):
    """Provider key without the key itself."""

    id: str
    """Id of the data source, which models name as `dataSourceId`."""
    name: str
    provider: KeyProvider
    base_url: str
    key_header: str | None
    has_key: bool
    key_set_at: Instant
    is_public: bool
    """Whether the whole organization may register models with it."""
    organization_id: str
    owner_id: str
    created_at: Instant
    updated_at: Instant


class ProviderKeyList(WireStruct):
    """Page of a list of provider keys; `count` is the total."""

    count: int
    limit: int
    offset: int
    provider_keys: Sequence[ProviderKeyShape]


class ProviderKeyTest(WireStruct):
    """Result of a test with the stored key."""

    ok: bool
    message: str
    duration_ms: int
    models: Sequence[str]
    """Names of at most 1,000 models that the provider lists, for `vendorModelId`; empty if it lists none."""


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────


async def index(request: GatewayRequest) -> JsonResponse:
    """List the provider keys that the caller may use."""
    part, order = request.query.page(), request.query[SORT]
    async with request.gateway.database.read() as connection:
        count, found = await data_source_rows.page(
            connection, request.caller, DataSourceType.AI_PROVIDER, part, order
        )
    shown = [_show(stored) for stored in found]
    return JsonResponse(
        ProviderKeyList(count=count, limit=part.limit, offset=part.offset, provider_keys=shown)
    )


async def show(request: GatewayRequest) -> JsonResponse:
    """Show a provider key without the key itself."""
    stored = await _read(request)
    return data_source_editing.answer(stored, _show(stored))


async def test(request: GatewayRequest) -> JsonResponse:
    """Test a stored key of a provider of language models: list its models with the key, which costs nothing.

    The answer has the names of the models. A failed connection is answered with 200 and `ok` false. More than 30 tests
    of the organization within a minute are refused with 429.
    """
    stored = await _read(request)
    found = await request.gateway.probes.probe(stored.source)
    return JsonResponse(
        ProviderKeyTest(
            ok=found.is_ok,
            message=found.message,
            duration_ms=found.duration_milliseconds,
            models=sorted(found.models)[: limits.LISTED_PROVIDER_MODELS],
        )
    )


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────


async def create(request: GatewayRequest) -> JsonResponse:
    """Store a key of a provider of language models, encrypted.

    Models name the returned id as `dataSourceId`. A repetition with the same `Idempotency-Key` creates nothing.
    """
    value = await read_json(request)
    body = body_of(request, value, CreateProviderKey)
    gateway, fields = request.gateway, _build_data_source(body)
    source = PROVIDER_KEY.build(request.caller, fields, gateway.vault, gateway.clock())
    read_only.warn_of_new(
        request, value, CreateProviderKey, lambda: PROVIDER_KEY.as_json(StoredDataSource(source, {}))
    )
    request.warnings.extend(data_source_editing.warn_of_plain_http(source))
    compared = data_source_editing.without_secrets(value, gateway.settings.secret, "apiKey")
    key = request.idempotency_key(compared)
    return await gateway.data_source_editor.create(request.caller, source, key)


async def update(request: GatewayRequest) -> JsonResponse:
    """Change a provider key; absent fields do not change.

    The key is sent to no other address than the one that it was stored with, so a change of that requires it again.
    """
    value = await read_json(request)
    body = body_of(request, value, UpdateProviderKey)
    gateway = request.gateway
    vault, now = gateway.vault, gateway.clock()

    def change(before: StoredDataSource) -> StoredDataSource:
        PROVIDER_KEY.require(before)
        read_only.require_same(value, UpdateProviderKey, lambda: PROVIDER_KEY.as_json(before))
        return PROVIDER_KEY.apply(before, _build_changes(before, body), vault, now)

    after = await own_fields.edit(gateway.data_source_editor, request.requested_object, change)
    request.warnings.extend(data_source_editing.warn_of_plain_http(after.source))
    return data_source_editing.answer(after, _show(after))


async def delete(request: GatewayRequest) -> NoContent:
    """Delete a provider key; with `force`, even if models use it: their calls then fail."""
    await _read(request)
    await request.gateway.data_source_editor.delete(request.requested_object, is_forced=request.query[FORCE])
    return NoContent()


async def _read(request: GatewayRequest) -> StoredDataSource:
    return await own_fields.read(request.gateway.data_source_editor, request.requested_object, PROVIDER_KEY)


def _build_data_source(body: CreateProviderKey) -> CreateDataSource:
    """Return the fields of the data source of a new key.

    Raises a 422 error if an address is missing for a provider without a public one, or belongs to another provider.
    """
    url = body.base_url or PUBLIC_URLS.get(body.provider)
    if url is None:
        message = f"baseUrl is required for the provider {body.provider}"
        raise errors.invalid([errors.problem("baseUrl", "required", message)])
    settings = {
        "provider": AiProviderProtocol.OPENAI_COMPATIBLE,
        "baseUrl": url,
        **({} if body.key_header is None else {"keyHeader": body.key_header}),
    }
    if body.provider is KeyProvider.ANTHROPIC:
        settings["provider"] = AiProviderProtocol.ANTHROPIC
    elif _find_provider(settings) is not body.provider:
        message = (
            "The provider openai-compatible has addresses of its own, and every other one its public address"
        )
        raise errors.invalid([errors.problem("baseUrl", "wrong-provider", message)])
    secrets = {} if body.api_key is None else {"key": body.api_key}
    return CreateDataSource(
        name=body.name, type=DataSourceType.AI_PROVIDER, settings=settings, secrets=secrets
    )


def _build_changes(before: StoredDataSource, body: UpdateProviderKey) -> UpdateDataSource:
    """Return the changes of the data source.

    Raises a 422 error if address or header change and the body doesn't repeat a stored key, which would be sent
    elsewhere.
    """
    settings: dict[str, Any] = {}
    if body.base_url is not msgspec.UNSET:
        settings["baseUrl"] = body.base_url
    if body.key_header is not msgspec.UNSET:
        settings["keyHeader"] = body.key_header
    stored, has_key = before.source.settings, bool(before.source.secret_names)
    moved = [name for name, value in settings.items() if value != stored.get(name)]
    if moved and has_key and body.api_key is msgspec.UNSET:
        message = f"apiKey is required when {moved[0]} changes: it is part of its destination"
        raise errors.invalid([errors.problem("apiKey", "required", message)])
    return UpdateDataSource(
        name=None if body.name is msgspec.UNSET else body.name,
        settings=settings,
        secrets=None if body.api_key is msgspec.UNSET else {"key": body.api_key},
    )


def _find_provider(settings: Mapping[str, Any]) -> KeyProvider:
    """Return the provider of a data source by its protocol and its address; `openai-compatible` for other addresses."""
    if settings.get("provider") == AiProviderProtocol.ANTHROPIC:
        return KeyProvider.ANTHROPIC
    url = str(settings["baseUrl"]).rstrip("/")
    named = (provider for provider, public in PUBLIC_URLS.items() if public == url)
    found = next(named, KeyProvider.OPENAI_COMPATIBLE)
    return KeyProvider.OPENAI_COMPATIBLE if found is KeyProvider.ANTHROPIC else found


def _show(stored: StoredDataSource) -> ProviderKeyShape:
    source = stored.source
    return ProviderKeyShape(
        id=source.id,
        name=source.name,
        provider=_find_provider(source.settings),
        base_url=str(source.settings["baseUrl"]),
        key_header=source.settings.get("keyHeader"),
        has_key=bool(source.secret_names),
        key_set_at=instant(source.secrets_set_at),
        is_public=source.is_public,
        organization_id=source.organization_id,
        owner_id=source.owner_id,
        created_at=instant(source.created_at),
        updated_at=instant(source.updated_at),
    )


PROVIDER_KEY: Final = SourceResource(DataSourceType.AI_PROVIDER, "provider key", FIELDS, _show)
