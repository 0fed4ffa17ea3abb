"""Language models in requests and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias

import msgspec
from msgspec import Meta

from engine.model_calls import ModelProvider
from engine.model_limits import CallRate, TokenRate
from engine.model_prices import Price
from gateway.ai_models.model_rows import StoredModel
from gateway.http import limits, text_rules
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import Instant, StrictWire, WireStruct, instant
from models import ids
from models.ai_model import AiModel

if TYPE_CHECKING:
    from datetime import datetime

    from models.access import ApiCaller

Name: TypeAlias = Annotated[str, text_rules.describe_length(limits.MODEL_NAME_LENGTH, min_length=1)]
TokenCount: TypeAlias = Annotated[int, Meta(ge=1, le=limits.MODEL_TOKENS)]
Guests: TypeAlias = Annotated[Sequence[Annotated[str, Meta(max_length=64)]], Meta(max_length=limits.SHARES)]


class ModelType(StrEnum):
    """Operator of a model."""

    THIRD_PARTY = "third-party"
    SELF_HOSTED = "self-hosted"


class RegisteredProvider(StrEnum):
    """Protocol of the provider of a registered model."""

    OPENAI_COMPATIBLE = ModelProvider.OPENAI_COMPATIBLE.value
    ANTHROPIC = ModelProvider.ANTHROPIC.value


class PriceShape(StrictWire):
    """Prices in US dollars per million tokens, as decimal texts."""

    input: Price
    output: Price
    cache_read: Price | None = None
    """Price of input from the provider's cache; null for the price of other input."""
    cache_write: Price | None = None
    """Price of input that is written to the provider's cache; null for the price of other input."""


class LimitsShape(StrictWire):
    """Limits of all calls of a model by the organization; null: no limit."""

    requests_per_minute: CallRate | None = None
    tokens_per_minute: TokenRate | None = None
    """Input and output together."""
    concurrency: CallRate | None = None
    """Calls at the same time."""


class CapabilitiesShape(WireStruct):
    """Abilities that the last test has seen; null for one that it had no time to look at."""

    tools: bool | None
    """The model has called a tool with valid arguments."""
    json_schema: bool | None
    """The model has answered by a JSON Schema that it got as such."""
    json_mode: bool | None = None
    """The model has answered in its provider's JSON mode; null too if it follows schemas, which is better."""
    streaming: bool | None = None
    """The answer came as a stream; null for tests before this was looked at."""
    vision: bool | None = None
    """The model has named the color of an image."""
    parallel_tools: bool | None = None
    """The model has called a tool twice in one answer."""


class CreateModel(StrictWire):
    """Model to register."""

    read_only: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("id", "blockedUntil", "organizationId", "ownerId", "createdAt", "updatedAt"), ""),
        **dict.fromkeys(("capabilities", "testedAt"), "POST /api/v1/ai/models/:id/test"),
    }

    name: Name
    """Unique in the organization."""
    vendor_model_id: Annotated[str, text_rules.describe_length(limits.MODEL_NAME_LENGTH, min_length=1)]
    """Name of the model at its provider, such as `gpt-5-mini`."""
    data_source_id: Annotated[str, Meta(max_length=64)]
    """Data source of the type `ai-provider`, which has the address and the key."""
    type: ModelType = ModelType.THIRD_PARTY
    provider: RegisteredProvider | None = None
    """That of the data source; another one is refused."""
    context_length: TokenCount | None = None
    max_output_tokens: TokenCount | None = None
    price: PriceShape | None = None
    """Null if it is unknown: then costs are null too."""
    limits: LimitsShape | None = None
    """Calls that would exceed them wait."""
    is_shared: bool = False
    """True if the whole organization may use it."""
    shared_with: Guests = ()
    """Ids of further users who may use it."""


class UpdateModel(StrictWire):
    """Changes of a model; absent fields do not change. Another model or data source forgets the last test."""

    read_only: ClassVar[Mapping[str, str]] = {**CreateModel.read_only, "provider": ""}

    name: Name | msgspec.UnsetType = msgspec.UNSET
    vendor_model_id: (
        Annotated[str, text_rules.describe_length(limits.MODEL_NAME_LENGTH, min_length=1)] | msgspec.UnsetType
    ) = msgspec.UNSET
    data_source_id: Annotated[str, Meta(max_length=64)] | msgspec.UnsetType = msgspec.UNSET
    type: ModelType | msgspec.UnsetType = msgspec.UNSET
    context_length: TokenCount | msgspec.UnsetType | None = msgspec.UNSET
    max_output_tokens: TokenCount | msgspec.UnsetType | None = msgspec.UNSET
    price: PriceShape | msgspec.UnsetType | None = msgspec.UNSET
    limits: LimitsShape | msgspec.UnsetType | None = msgspec.UNSET
    is_shared: bool | msgspec.UnsetType = msgspec.UNSET
    shared_with: Guests | msgspec.UnsetType = msgspec.UNSET
    """Replaces the ids of the users who may use it."""


class ModelShape(WireStruct):
    """Registered model."""

    id: str
    name: str
    type: ModelType
    provider: RegisteredProvider
    vendor_model_id: str
    data_source_id: str
    context_length: int | None
    max_output_tokens: int | None
    price: PriceShape | None
    limits: LimitsShape | None
    capabilities: CapabilitiesShape | None
    """Null before the first test."""
    tested_at: Instant | None
    blocked_until: Instant | None
    """Time until which the provider accepts no calls, as it has said; null or past if it accepts them."""
    is_shared: bool
    shared_with: Sequence[str]
    """Ids of the users that it is shared with."""
    organization_id: str
    owner_id: str
    created_at: Instant
    updated_at: Instant


def build_model(caller: ApiCaller, body: CreateModel, now: datetime) -> StoredModel:
    """Return a new model of the caller, not stored yet; raises a 422 error for invalid texts.

    If the body names no provider, the model has a placeholder, in place of which the insertion sets that of the data
    source. The insertion checks the users, too.
    """
    problems = ProblemCollector()
    model = AiModel(
        id=ids.new_id("model"),
        organization_id=caller.organization_id,
        shard=caller.shard,
        owner_id=caller.user_id,
        name=_check_line(body.name, "name", problems),
        type=body.type,
        provider=body.provider or RegisteredProvider.OPENAI_COMPATIBLE,
        vendor_model_id=_check_line(body.vendor_model_id, "vendorModelId", problems),
        data_source_id=body.data_source_id,
        context_length=body.context_length,
        max_output_tokens=body.max_output_tokens,
        price=_to_stored(body.price),
        limits=_to_stored(body.limits) or None,
        is_shared=body.is_shared,
        created_at=now,
        updated_at=now,
    )
    problems.raise_any()
    return StoredModel(model, dict.fromkeys(body.shared_with, now))


def apply_changes(stored: StoredModel, body: UpdateModel, now: datetime) -> StoredModel:
    """Return a model with the changes of a body, not stored yet; raises a 422 error for invalid texts.

    Users that it is newly shared with have it since `now`. Another vendor model or data source removes the last test,
    its abilities, and a block by the provider.
    """
    problems, before = ProblemCollector(), stored.model
    given = {
        field.name: getattr(body, field.name)
        for field in msgspec.structs.fields(body)
        if getattr(body, field.name) is not msgspec.UNSET
    }
    shared_with = {
        user_id: stored.shared_with.get(user_id, now)
        for user_id in given.pop("shared_with", stored.shared_with)
    }
    for name, path in (("name", "name"), ("vendor_model_id", "vendorModelId")):
        if name in given:
            given[name] = _check_line(given[name], path, problems)
    problems.raise_any()
    if "price" in given:
        given["price"] = _to_stored(given["price"])
    if "limits" in given:
        given["limits"] = _to_stored(given["limits"]) or None
    changed = AiModel(**{**before.model_dump(), **given})
    if (changed.vendor_model_id, changed.data_source_id) != (before.vendor_model_id, before.data_source_id):
        changed.capabilities = changed.tested_at = changed.blocked_until = changed.last_test = None
    return StoredModel(changed, shared_with)


def show_model(stored: StoredModel) -> ModelShape:
    """Return a model in the form in which the API shows it."""
    model = stored.model
    seen, price, limited = model.capabilities, model.price, model.limits
    return ModelShape(
        id=model.id,
        name=model.name,
        type=ModelType(model.type),
        provider=RegisteredProvider(model.provider),
        vendor_model_id=model.vendor_model_id,
        data_source_id=model.data_source_id,
        context_length=model.context_length,
        max_output_tokens=model.max_output_tokens,
        price=None if price is None else msgspec.convert(price, PriceShape),
        limits=None if limited is None else msgspec.convert(limited, LimitsShape),
        capabilities=None if seen is None else msgspec.convert(seen, CapabilitiesShape),
        tested_at=None if model.tested_at is None else instant(model.tested_at),
        blocked_until=None if model.blocked_until is None else instant(model.blocked_until),
        is_shared=model.is_shared,
        shared_with=list(stored.shared_with),
        organization_id=model.organization_id,
        owner_id=model.owner_id,
        created_at=instant(model.created_at),
        updated_at=instant(model.updated_at),
    )


def _check_line(text: str, path: str, problems: ProblemCollector) -> str:
    return text_rules.check_line(text, path, problems, max_length=limits.MODEL_NAME_LENGTH)


def _to_stored(shape: PriceShape | LimitsShape | None) -> dict[str, Any] | None:
    """Return prices or limits as they are stored, without fields of None: {} if all are; None for None."""
    if shape is None:
        return None
    values: dict[str, Any] = msgspec.to_builtins(shape)
    return {name: value for name, value in values.items() if value is not None}
