"""Routes for language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from gateway.ai_models import (
    ai_models,
    ai_settings,
    model_costs,
    model_metrics,
    model_permissions,
    model_status,
    provider_keys,
    tool_servers,
    usable_models,
)
from gateway.ai_models.ai_settings import AiSettingsShape, UpdateAiSettings
from gateway.ai_models.model_metrics import ModelMetrics
from gateway.ai_models.model_permissions import ModelPermissions, SetPermissions
from gateway.ai_models.model_shapes import CreateModel, ModelShape, UpdateModel
from gateway.ai_models.model_status import ModelStatus
from gateway.ai_models.provider_keys import CreateProviderKey, ProviderKeyShape, UpdateProviderKey
from gateway.ai_models.tool_server_shapes import (
    AcceptTools,
    CreateToolServer,
    ToolServerShape,
    UpdateToolServer,
)
from gateway.ai_models.usable_models import UsableModelList
from gateway.data_sources.data_sources import NewDataSource
from gateway.http.operation_docs import CREATES, EDITS, IF_MATCH, TAGGED, OperationDoc
from gateway.http.route import READ_SOURCES, WRITE_SOURCES, Route
from models.access import KeyScope

ROUTES: Final[Sequence[Route]] = (
    Route(
        "GET",
        "/api/v1/ai/models",
        KeyScope.MODELS_READ,
        ai_models.index,
        query=ai_models.LISTED,
        answer=ai_models.ModelList,
    ),
    Route(
        "POST",
        "/api/v1/ai/models",
        KeyScope.MODELS_WRITE,
        ai_models.create,
        body=CreateModel,
        answer=ai_models.NewModel,
        status=201,
        docs=CREATES.refusing("model-name-taken", "too-many-models"),
    ),
    Route(
        "GET",
        "/api/v1/ai/models/{id}",
        KeyScope.MODELS_READ,
        ai_models.show,
        answer=ModelShape,
        docs=TAGGED,
    ),
    Route(
        "PUT",
        "/api/v1/ai/models/{id}",
        KeyScope.MODELS_WRITE,
        ai_models.update,
        query=(ai_models.FORCE,),
        body=UpdateModel,
        answer=ModelShape,
        docs=EDITS.refusing("model-name-taken", "model-in-use"),
    ),
    Route(
        "DELETE",
        "/api/v1/ai/models/{id}",
        KeyScope.MODELS_WRITE,
        ai_models.delete,
        query=(ai_models.FORCE,),
        status=204,
        docs=OperationDoc(takes=(IF_MATCH,), refusals=("not-owner", "precondition-failed", "model-in-use")),
    ),
    Route(
        "POST",
        "/api/v1/ai/models/{id}/test",
        KeyScope.MODELS_WRITE,
        ai_models.test,
        answer=ai_models.ModelTest,
        docs=OperationDoc(refusals=("rate-limited",)),
    ),
    Route(
        "GET",
        "/api/v1/ai/models/{id}/status",
        KeyScope.MODELS_READ,
        model_status.show,
        answer=ModelStatus,
    ),
    Route(
        "GET",
        "/api/v1/ai/models/{id}/metrics",
        KeyScope.MODELS_READ,
        model_metrics.show,
        query=(model_metrics.WINDOW,),
        answer=ModelMetrics,
        docs=OperationDoc(refusals=("not-owner",)),
    ),
    Route(
        "GET",
        "/api/v1/ai/models/{id}/permissions",
        KeyScope.MODELS_READ,
        model_permissions.show,
        answer=ModelPermissions,
        docs=TAGGED,
    ),
    Route(
        "PUT",
        "/api/v1/ai/models/{id}/permissions",
        KeyScope.MODELS_WRITE,
        model_permissions.update,
        query=(ai_models.FORCE,),
        body=SetPermissions,
        answer=ModelPermissions,
        docs=EDITS.refusing("model-name-taken", "model-in-use"),
    ),
)
USABLE: Final = Route(
    "GET", "/api/v1/ai-models", KeyScope.MODELS_READ, usable_models.index, answer=UsableModelList
)

PROVIDER_KEYS: Final[Sequence[Route]] = (
    Route(
        "GET",
        "/api/v1/ai/provider-keys",
        READ_SOURCES,
        provider_keys.index,
        query=provider_keys.LISTED,
        answer=provider_keys.ProviderKeyList,
    ),
    Route(
        "POST",
        "/api/v1/ai/provider-keys",
        WRITE_SOURCES,
        provider_keys.create,
        body=CreateProviderKey,
        answer=NewDataSource,
        status=201,
        docs=CREATES.refusing("data-source-name-taken", "too-many-data-sources"),
    ),
    Route(
        "GET",
        "/api/v1/ai/provider-keys/{id}",
        READ_SOURCES,
        provider_keys.show,
        answer=ProviderKeyShape,
        docs=TAGGED,
    ),
    Route(
        "PUT",
        "/api/v1/ai/provider-keys/{id}",
        WRITE_SOURCES,
        provider_keys.update,
        body=UpdateProviderKey,
        answer=ProviderKeyShape,
        docs=EDITS.refusing("data-source-name-taken"),
    ),
    Route(
        "DELETE",
        "/api/v1/ai/provider-keys/{id}",
        WRITE_SOURCES,
        provider_keys.delete,
        query=(provider_keys.FORCE,),
        status=204,
        docs=OperationDoc(
            takes=(IF_MATCH,), refusals=("not-owner", "precondition-failed", "data-source-in-use")
        ),
    ),
    Route(
        "POST",
        "/api/v1/ai/provider-keys/{id}/test",
        READ_SOURCES,
        provider_keys.test,
        answer=provider_keys.ProviderKeyTest,
    ),
)

TOOL_SERVERS: Final[Sequence[Route]] = (
    Route(
        "GET",
        "/api/v1/ai/tool-servers",
        READ_SOURCES,
        tool_servers.index,
        query=tool_servers.LISTED,
        answer=tool_servers.ToolServerList,
    ),
    Route(
        "POST",
        "/api/v1/ai/tool-servers",
        WRITE_SOURCES,
        tool_servers.create,
        body=CreateToolServer,
        answer=NewDataSource,
        status=201,
        docs=CREATES.refusing("data-source-name-taken", "too-many-data-sources"),
    ),
    Route(
        "GET",
        "/api/v1/ai/tool-servers/{id}",
        READ_SOURCES,
        tool_servers.show,
        answer=ToolServerShape,
        docs=TAGGED,
    ),
    Route(
        "PUT",
        "/api/v1/ai/tool-servers/{id}",
        WRITE_SOURCES,
        tool_servers.update,
        body=UpdateToolServer,
        answer=ToolServerShape,
        docs=EDITS.refusing("data-source-name-taken"),
    ),
    Route(
        "DELETE",
        "/api/v1/ai/tool-servers/{id}",
        WRITE_SOURCES,
        tool_servers.delete,
        query=(tool_servers.FORCE,),
        status=204,
        docs=OperationDoc(
            takes=(IF_MATCH,), refusals=("not-owner", "precondition-failed", "data-source-in-use")
        ),
    ),
    Route(
        "POST",
        "/api/v1/ai/tool-servers/{id}/test",
        READ_SOURCES,
        tool_servers.test,
        answer=tool_servers.ToolServerTest,
    ),
    Route(
        "POST",
        "/api/v1/ai/tool-servers/{id}/refresh",
        WRITE_SOURCES,
        tool_servers.refresh,
        answer=tool_servers.ToolServerRefresh,
        docs=replace(EDITS, refusals=("not-owner", "precondition-failed", "edit-conflict")),
    ),
    Route(
        "POST",
        "/api/v1/ai/tool-servers/{id}/accept",
        WRITE_SOURCES,
        tool_servers.accept,
        body=AcceptTools,
        answer=ToolServerShape,
        docs=EDITS,
    ),
)

COSTS: Final[Sequence[Route]] = (
    Route(
        "GET",
        "/api/v1/ai/costs",
        KeyScope.MODELS_READ,
        model_costs.index,
        query=(model_costs.MONTH, model_costs.WORKFLOW),
        answer=model_costs.ModelCostList,
    ),
)
SETTINGS: Final[Sequence[Route]] = (
    Route("GET", "/api/v1/ai/settings", KeyScope.MODELS_READ, ai_settings.show, answer=AiSettingsShape),
    Route(
        "PUT",
        "/api/v1/ai/settings",
        KeyScope.MODELS_WRITE,
        ai_settings.update,
        body=UpdateAiSettings,
        answer=AiSettingsShape,
        docs=OperationDoc(refusals=("admin-required", "validation-failed")),
    ),
)
ALIASES: Final[Sequence[Route]] = (
    *(replace(route, path=route.path.replace("/ai/models", "/models")) for route in ROUTES),
    replace(USABLE, path="/api/v1/workflow-nodes/services/models"),
)
"""The same operations under other paths."""
