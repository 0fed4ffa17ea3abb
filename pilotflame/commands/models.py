"""Commands for language models."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from pilotflame import exit_codes, price_proposals
from pilotflame.command_error import CommandError
from pilotflame.commands.arguments import AllOption, LimitOption, YesOption, confirm, read_object
from pilotflame.commands.datasources import find_source
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list, show_object, take
from pilotflame.commands.server_connection import connect
from pilotflame.price_catalog import open_catalog
from pilotflame.price_proposals import PriceState

app = new_noun("Manage the language models that workflows may call.")
MODELS = "/api/v1/ai/models"
SETTINGS = "/api/v1/ai/settings"
ECHO = "echo"
"""Id of the built-in model."""
COLUMNS = {
    "Id": "id",
    "Name": "name",
    "Model": "vendorModelId",
    "Data source": "dataSourceId",
    "Shared": "isShared",
    "Tested": "testedAt",
}
ModelArgument = Annotated[str, Argument(metavar="MODEL", help="Id or exact name of the model.")]
PriceOption = Annotated[
    str | None,
    Option("--price", help='Dollars per million tokens, as JSON: {"input": "0.25", "output": "2"}.'),
]
GuestsOption = Annotated[
    str | None,
    Option("--share-with", help="Ids of the users who may use it, with commas between; empty for nobody."),
]
COST_COLUMNS = {
    "Workflow": "workflowName",
    "Id": "workflowId",
    "Model": "modelId",
    "Calls": "calls",
    "Input tokens": "inputTokens",
    "Output tokens": "outputTokens",
    "Dollars": "cost",
}
METRIC_COLUMNS = {
    "From": "startsAt",
    "Requests": "requests",
    "Failed": "failed",
    "Input tokens": "inputTokens",
    "Output tokens": "outputTokens",
    "Dollars": "cost",
    "p50 ms": "p50Ms",
    "p95 ms": "p95Ms",
}
PRICE_COLUMNS = {
    "Name": "name",
    "Model": "vendorModelId",
    "Price": "price",
    "Public price": "proposed",
    "Entry": "entry",
    "State": "state",
    "Reason": "problem",
}
FORCED = {"force": "true"}
ForceOption = Annotated[bool, Option("--force", help="Even if workflows name it.")]


@app.command("list")
def list_models(
    limit: LimitOption = 100, every: AllOption = False, output: FormatOption = OutputFormat.TABLE
) -> None:
    """List the models that the key may use."""
    show_list(take(connect().iterate(MODELS, "models", {}), limit, all_items=every), output, COLUMNS)


@app.command("get")
def get_model(model: ModelArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Print a language model with its provider, prices and last test."""
    show_object(connect().request("GET", f"{MODELS}/{find_model(model)}"), output)


@app.command("create")
def create_model(
    name: Annotated[str, Argument(help="Name of the model.")],
    vendor: Annotated[str, Option("--vendor-model", help="Name at the provider, such as gpt-5-mini.")],
    source: Annotated[str, Option("--datasource", help="Id or name of the provider's data source.")],
    price: PriceOption = None,
    shared: Annotated[bool, Option("--shared", help="Let the whole organization use it.")] = False,
    guests: GuestsOption = None,
) -> None:
    """Register a model of a provider and print its id."""
    body: dict[str, Any] = {
        "name": name,
        "vendorModelId": vendor,
        "dataSourceId": find_source(source),
        "isShared": shared,
        "sharedWith": _split_ids(guests or ""),
    }
    if price is not None:
        body["price"] = read_object(price, "--price")
    typer.echo(connect().request("POST", MODELS, json=body, is_keyed=True)["modelId"])


@app.command("update")
def update_model(
    model: ModelArgument,
    name: Annotated[str | None, Option(help="New name.")] = None,
    price: PriceOption = None,
    shared: Annotated[
        bool | None, Option("--shared/--private", help="Let the whole organization use it, or not.")
    ] = None,
    guests: GuestsOption = None,
    force: ForceOption = False,
) -> None:
    """Change a model; options that are not given change nothing."""
    body = {
        "name": name,
        "price": None if price is None else read_object(price, "--price"),
        "isShared": shared,
        "sharedWith": None if guests is None else _split_ids(guests),
    }
    changes = {field: value for field, value in body.items() if value is not None}
    connect().request("PUT", f"{MODELS}/{find_model(model)}", json=changes, query=FORCED if force else None)


@app.command("delete")
def delete_model(model: ModelArgument, force: ForceOption = False, yes: YesOption = False) -> None:
    """Delete a model."""
    confirm(f"Delete the model {model}?", is_confirmed=yes)
    connect().request("DELETE", f"{MODELS}/{find_model(model)}", query=FORCED if force else None)


@app.command("test")
def call_model(model: ModelArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Call a model and store its abilities; exits with 1 unless it answers."""
    result: dict[str, Any] = connect().request("POST", f"{MODELS}/{find_model(model)}/test")
    show_object(result, output)
    if not result["ok"]:
        raise typer.Exit(exit_codes.REFUSED)


@app.command("status")
def show_status(model: ModelArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Print the status of a model by its last test and its provider's limits, without a call."""
    show_object(connect().request("GET", f"{MODELS}/{find_model(model)}/status"), output)


@app.command("metrics")
def show_metrics(
    model: ModelArgument,
    window: Annotated[str, Option(help="24h, 7d, 30d or 90d.")] = "24h",
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """Print calls, failures, tokens, cost and latency of a model by hours or days; JSON has the failures by code."""
    path = f"{MODELS}/{find_model(model)}/metrics"
    found = connect().request("GET", path, query={"window": window})
    if output is not OutputFormat.TABLE:
        show_object(found, output, key="modelId")
        return
    total = {**found["total"], "startsAt": "total"}
    rows = [period for period in found["periods"] if period["requests"]]
    show_list([*rows, total], output, METRIC_COLUMNS, key="startsAt")


@app.command("prices")
def propose_prices(
    models: Annotated[
        list[str] | None,
        Argument(
            metavar="[MODEL]...", help="Ids or exact names; without any, all models.", show_default=False
        ),
    ] = None,
    source: Annotated[
        Path | None,
        Option("--from", help="File prices/data.json of genai-prices, in place of the installed package."),
    ] = None,
    write: Annotated[bool, Option("--write", help="Store the proposals for models without a price.")] = False,
    replace: Annotated[bool, Option("--replace", help="With --write: replace other prices too.")] = False,
    yes: YesOption = False,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """Compare the prices of models with the public ones of genai-prices, and store these with --write."""
    catalog, server, today = open_catalog(source), connect(), datetime.now(UTC).date()
    listed = list(server.iterate(MODELS, "models", {}))
    wanted = None if models is None else {find_model(one) for one in models}
    proposals = [
        price_proposals.propose_price(server, catalog, one, today)
        for one in listed
        if wanted is None or one["id"] in wanted
    ]
    show_list(proposals, output, PRICE_COLUMNS)
    states = {PriceState.NEW, PriceState.OTHER} if replace else {PriceState.NEW}
    chosen = [one for one in proposals if write and one["state"] in states]
    if not chosen:
        return
    confirm(
        f"Store {len(chosen)} prices? They are public ones, not those of your contract.", is_confirmed=yes
    )
    for one in chosen:
        server.request("PUT", f"{MODELS}/{one['id']}", json={"price": one["proposed"]})
        typer.echo(f"{one['name']}: stored", err=True)


@app.command("costs")
def list_costs(
    month: Annotated[str | None, Option(help="Calendar month, such as 2026-11.")] = None,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the costs of a month by workflow and model, the highest first."""
    query = {} if month is None else {"month": month}
    found = connect().request("GET", "/api/v1/ai/costs", query=query)
    show_list(found["costs"], output, COST_COLUMNS, key="workflowId")
    budget = found["budget"]
    if budget is not None and output is OutputFormat.TABLE:
        typer.echo(f"Budget of the month: {_describe_budget(budget)}")


@app.command("budget")
def set_budget(
    max_cost: Annotated[str | None, Option(help="Dollars in a month, such as 250.")] = None,
    max_tokens: Annotated[int | None, Option(help="Tokens in a month.")] = None,
    on_limit: Annotated[str, Option(help="fail, or wait for the next month.")] = "fail",
    remove: Annotated[bool, Option("--remove", help="Remove the budget.")] = False,
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Set or print the budget of the organization for all language models in a month."""
    server = connect()
    if remove or max_cost is not None or max_tokens is not None:
        budget = {"maxCost": max_cost, "maxTokens": max_tokens, "onLimit": on_limit}
        body = {"monthBudget": None if remove else budget}
        show_object(server.request("PUT", SETTINGS, json=body), output)
    else:
        show_object(server.request("GET", SETTINGS), output)


@app.command("default")
def set_default(
    model: Annotated[
        str | None, Argument(metavar="MODEL", help="Id or exact name of a shared model, or echo.")
    ] = None,
    remove: Annotated[bool, Option("--remove", help="Leave the organization without one.")] = False,
) -> None:
    """Set or print the model that nodes name by `default`."""
    server = connect()
    if remove or model is not None:
        model_id = None if remove or model is None else find_model(model)
        found = server.request("PUT", SETTINGS, json={"defaultModelId": model_id})
    else:
        found = server.request("GET", SETTINGS)
    typer.echo(found["defaultModelId"] or "none")


def _describe_budget(budget: dict[str, Any]) -> str:
    """Return a line with the spent and reserved part of each limit of a budget."""
    parts = []
    if budget["maxCost"] is not None:
        parts.append(
            f"${budget['spentCost']} spent and ${budget['reservedCost']} reserved of ${budget['maxCost']}"
        )
    if budget["maxTokens"] is not None:
        counts = [budget[name] for name in ("spentTokens", "reservedTokens", "maxTokens")]
        parts.append("{:,} tokens spent and {:,} reserved of {:,}".format(*counts))
    return "; ".join(parts)


def _split_ids(text: str) -> list[str]:
    """Return the ids of a text with commas between."""
    return [part.strip() for part in text.split(",") if part.strip()]


def find_model(id_or_name: str) -> str:
    """Return the id of a model: an id, or `echo`, is returned unchecked,
    else the name, with or without `@`, is looked up.

    Raises `CommandError` unless exactly one has the name.
    """
    if id_or_name.startswith("model_") or id_or_name == ECHO:
        return id_or_name
    named = id_or_name.removeprefix("@")
    found = [str(one["id"]) for one in connect().iterate(MODELS, "models", {}) if one["name"] == named]
    if len(found) != 1:
        count = "no model" if not found else f"{len(found)} models"
        raise CommandError(f"There is {count} {named!r}", exit_codes.REFUSED)
    return found[0]
