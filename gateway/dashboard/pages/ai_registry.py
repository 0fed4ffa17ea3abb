"""Language models with costs, and one with its status and metrics; tool servers, and one with its tools."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from msgspec import Struct

from engine.values import MISSING, compare_values
from gateway.dashboard.addresses import page_address
from gateway.dashboard.formats import show_json, show_value
from gateway.dashboard.hour_charts import draw_bars, label_hours
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.dashboard.page_request import PageRequest

LIMIT: Final = 100
SHOWN_BOXES: Final = 1_000
"""Boxes for users in all models of the page; with more, their ids are typed: a hundred models of a hundred users
would be a page of a megabyte.
"""
PATH: Final = "/dashboard/models"
SHOWN_COSTS: Final = 20
RECENT_SECONDS: Final = 10.0
"""Time for which the usage of the day is shown again."""
MAX_CHANGES: Final = 20
COMPARED: Final = ("title", "description", "inputSchema", "hints", "problem")
"""Fields in which two definitions of a tool are compared."""
ABILITIES: Final[Mapping[str, str]] = {
    "tools": "calls tools",
    "parallelTools": "calls several at once",
    "jsonSchema": "follows schemas",
    "jsonMode": "answers in JSON",
    "streaming": "streams",
    "vision": "sees images",
}
"""Abilities of models in words."""
STATES: Final[Mapping[str, str]] = {
    "new": "not accepted",
    "accepted": "accepted",
    "changed": "changed since its acceptance",
    "removed": "not listed any more",
    "unusable": "can't be used",
}
"""States of tools in words."""


class ModelGuest(Struct, frozen=True):
    """User that a model may be shared with."""

    id: str
    name: str
    is_guest: bool
    """Whether it is shared with the user."""


class ToolChange(Struct, frozen=True):
    """Place in the definition of a tool that differs: the accepted value, and that of the server; None for none."""

    path: str
    before: str | None
    after: str | None


class ToolView(Struct, frozen=True):
    """Tool of a server, with its definition as texts."""

    tool: Mapping[str, Any]
    state: str
    definition: Mapping[str, Any]
    """Definition of the server; of a tool that isn't listed any more, the accepted one."""
    schema: str
    changes: Sequence[ToolChange]
    """Differences of a changed definition from the accepted one, at most 20."""


async def load(page: PageRequest) -> PageData:
    """Ask the API for the first 100 models, tool servers and users, the settings, the costs of the month, the usage
    of 24 hours, the selected tool server, and status and metrics of the selected model.

    Answers that the visitor may not see, or that are not asked for, are None. Raises `ApiError`.
    """
    selected = page.query.get("server", "")
    path = f"/api/v1/ai/tool-servers/{quote(selected, safe='')}"
    model = f"/api/v1/ai/models/{quote(page.query.get('model', ''), safe='')}"
    has_model = bool(page.query.get("model"))
    models, settings, servers, users, server, costs, day, status, metrics = await asyncio.gather(
        page.get("/api/v1/ai/models", limit=LIMIT),
        page.get_if_present("/api/v1/ai/settings"),
        page.get_if_present("/api/v1/ai/tool-servers", limit=LIMIT),
        page.get_if_present("/api/v1/auth/users", limit=LIMIT),
        page.get_if_present(path) if selected else asyncio.sleep(0),
        page.get_if_present("/api/v1/ai/costs"),
        page.get_recent("/api/v1/executions/statistics", seconds=RECENT_SECONDS),
        page.get_if_present(f"{model}/status") if has_model else asyncio.sleep(0),
        page.get_if_present(f"{model}/metrics", window="7d") if has_model else asyncio.sleep(0),
    )
    return {
        "models": models,
        "settings": settings,
        "servers": servers,
        "users": users,
        "server": server,
        "costs": costs,
        "day": None if day is None else {"total": day["total"]["usage"], "hours": list_hours(day["hours"])},
        "status": status,
        "metrics": metrics,
    }


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the models with their abilities and prices, and the tool servers with tools."""
    server, servers = data["server"], data["servers"] or {"count": 0, "toolServers": []}
    visitor = frame.visitor or {"role": "", "userId": ""}
    costs, status = _sum_costs(data["costs"]), data["status"]
    selected = next(
        (one for one in data["models"]["models"] if status is not None and one["id"] == status["modelId"]),
        None,
    )
    names = {user["id"]: user["name"] or user["email"] for user in (data["users"] or {"users": ()})["users"]}
    has_boxes = data["users"] is not None and len(names) * len(data["models"]["models"]) <= SHOWN_BOXES
    return {
        "title": "Models and tools",
        "crumbs": (("Models and tools", ""),),
        "models": [
            {
                **model,
                "abilities": _list_abilities(model),
                "prices": _show_prices(model),
                "isBlocked": _is_blocked(model, frame.now),
                "monthCost": costs.get(model["id"]),
                "users": _list_users(model, {**names, visitor["userId"]: "you"}),
                "guests": _list_guests(model, names) if has_boxes else None,
                "mayShare": frame.may("models:write")
                and (visitor["role"] == "admin" or visitor["userId"] == model["ownerId"]),
            }
            for model in data["models"]["models"]
        ],
        "model_count": data["models"]["count"],
        "day": data["day"],
        "day_bars": draw_bars([hour["calls"] for hour in data["day"]["hours"]]) if data["day"] else None,
        "hour_labels": label_hours(data["day"]["hours"]) if data["day"] else (),
        "is_admin": visitor["role"] == "admin",
        "month_costs": () if data["costs"] is None else data["costs"]["costs"][:SHOWN_COSTS],
        "hidden_costs": 0 if data["costs"] is None else max(len(data["costs"]["costs"]) - SHOWN_COSTS, 0),
        "month_cost": None if data["costs"] is None else data["costs"]["cost"],
        "model_names": {one["id"]: one["name"] for one in data["models"]["models"]},
        "month": None if data["costs"] is None else data["costs"]["month"],
        "month_budget": None if data["costs"] is None else data["costs"]["budget"],
        "model": selected,
        "status": status,
        "metrics": data["metrics"],
        "default_model_id": (data["settings"] or {}).get("defaultModelId"),
        "servers": servers["toolServers"],
        "server_count": servers["count"],
        "server": server,
        "tools": [] if server is None else [_view_tool(tool) for tool in server["tools"]],
        "may_test": frame.may("models:write"),
        "may_change": server is not None
        and frame.may("datasources:write")
        and (visitor["role"] == "admin" or visitor["userId"] == server["ownerId"]),
        "address_of": lambda server_id: page_address(frame, PATH, {"server": server_id, "model": ""}),
        "model_address": lambda model_id: page_address(frame, PATH, {"model": model_id, "server": ""}),
    }


def list_hours(hours: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return start and number of model calls of each hour; without counts of runs, which change far more often."""
    return [{"startsAt": hour["startsAt"], "calls": hour["usage"]["calls"]} for hour in hours]


def _sum_costs(costs: Mapping[str, Any] | None) -> Mapping[str, str]:
    """Return the cost of each model in a month, in dollars; models without calls of a known cost are absent."""
    sums: dict[str, Decimal] = {}
    for row in () if costs is None else costs["costs"]:
        if row["calls"] == row["unpricedCalls"]:
            continue
        sums[row["modelId"]] = sums.get(row["modelId"], Decimal(0)) + Decimal(row["cost"])
    return {model_id: f"{cost.normalize():f}" for model_id, cost in sums.items()}


def _list_abilities(model: Mapping[str, Any]) -> str:
    """Return the abilities that the last test has seen, as a text; empty before the first test."""
    seen = model["capabilities"]
    if seen is None:
        return ""
    return ", ".join(text for name, text in ABILITIES.items() if seen.get(name)) or "answers texts"


def _list_users(model: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return the users of a model as a text, by name, or by id without a right to names."""
    if model["isShared"]:
        return "everybody in the organization"
    users = [names.get(user_id, user_id) for user_id in (model["ownerId"], *model["sharedWith"])]
    return f"{', '.join(users)}, and admins"


def _list_guests(model: Mapping[str, Any], names: Mapping[str, str]) -> Sequence[ModelGuest]:
    """Return the users with whom a model is shared, then the other users of `names` with whom it may be shared."""
    shared_with = model["sharedWith"]
    others = [user_id for user_id in names if user_id != model["ownerId"] and user_id not in shared_with]
    return [
        ModelGuest(user_id, names.get(user_id, user_id), is_guest=user_id in shared_with)
        for user_id in (*shared_with, *others)
    ]


def _is_blocked(model: Mapping[str, Any], now: datetime) -> bool:
    """Return whether the provider of a model has asked for a pause that lasts beyond `now`."""
    until = model["blockedUntil"]
    return until is not None and datetime.fromisoformat(until) > now


def _show_prices(model: Mapping[str, Any]) -> str:
    """Return the prices of input and output per million tokens; empty if they are unknown."""
    price = model["price"]
    return "" if price is None else f"${price['input']} in, ${price['output']} out"


def _view_tool(tool: Mapping[str, Any]) -> ToolView:
    accepted: Mapping[str, Any] = (tool["accepted"] or {}).get("definition", {})
    definition: Mapping[str, Any] = tool["offered"] or accepted
    return ToolView(
        tool=tool,
        state=STATES.get(tool["status"], tool["status"]),
        definition=definition,
        schema=show_json(definition["inputSchema"]),
        changes=_list_changes(accepted, definition) if tool["status"] == "changed" else (),
    )


def _list_changes(accepted: Mapping[str, Any], offered: Mapping[str, Any]) -> Sequence[ToolChange]:
    """Return the places, at most 20, in which the server's definition of a tool differs from the accepted one."""
    before, after = ({name: side[name] for name in COMPARED} for side in (accepted, offered))
    return [
        ToolChange(
            change.path,
            None if change.before is MISSING else show_value(change.before),
            None if change.after is MISSING else show_value(change.after),
        )
        for change in compare_values(before, after, at_most=MAX_CHANGES).changes
    ]


PAGE: Final = Page(PATH, "ai_registry.html", load, view, "models")
