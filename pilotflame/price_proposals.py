"""Public prices beside those of registered language models."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from datetime import date

    from pilotflame_sdk import Client

    from pilotflame.price_catalog import CatalogPrice, PriceCatalog


class PriceState(StrEnum):
    """Comparison of a model's price with the public one."""

    NEW = "new"
    """It has no price yet."""
    SAME = "same"
    OTHER = "other"
    UNKNOWN = "unknown"
    """The catalog does not know its address or name, or the data source is not readable."""
    BY_HAND = "by hand"
    """A price of a model can't express the public one."""


def propose_price(
    server: Client, catalog: PriceCatalog, model: Mapping[str, Any], today: date
) -> dict[str, Any]:
    """Return a proposal for a model as the API shows it: its price, the public one (None if the catalog has none, or
    the model's data source can't be read), and their comparison as `state`.

    Raises `APIError`, and `CommandError` for a catalog entry in another format; stores nothing.
    """
    base_url = _read_address(server, model["dataSourceId"])
    found = None if base_url is None else catalog.find(base_url, model["vendorModelId"], today)
    present = {name: value for name, value in (model["price"] or {}).items() if value is not None}
    return {
        "id": model["id"],
        "name": model["name"],
        "vendorModelId": model["vendorModelId"],
        "price": present or None,
        "proposed": None if found is None else dict(found.price),
        "entry": None if found is None else found.entry,
        "state": _find_state(present, found),
        "problem": None if found is None else found.problem or None,
    }


def _find_state(present: Mapping[str, str], found: CatalogPrice | None) -> PriceState:
    """Return the state of a model by its present price, empty without one, and the public one."""
    if found is None:
        return PriceState.UNKNOWN
    if found.problem:
        return PriceState.BY_HAND
    if not present:
        return PriceState.NEW
    is_same = present.keys() == found.price.keys() and all(
        Decimal(present[name]) == Decimal(value) for name, value in found.price.items()
    )
    return PriceState.SAME if is_same else PriceState.OTHER


def _read_address(server: Client, source_id: str) -> str | None:
    """Return the address of the provider of a data source.

    None for a data source that the user may not read, as of a shared model.
    """
    from pilotflame_sdk import NotFound, ScopeRequired

    try:
        source = server.request("GET", f"/api/v1/datasources/{quote(source_id, safe='')}")
    except (NotFound, ScopeRequired):
        return None
    address: str = source["settings"]["baseUrl"]
    return address
