"""Public prices of language models: of the package `genai-prices`, or of a file in the format that it publishes.

They are proposals, which a person reads before they are stored: the catalog says of itself that it is not exact.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from decimal import ROUND_UP, Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final, Protocol

from msgspec import Struct

from pilotflame import exit_codes
from pilotflame.command_error import CommandError

KEYS: Final[Mapping[str, str]] = {
    "input": "input_mtok",
    "output": "output_mtok",
    "cacheRead": "cache_read_mtok",
    "cacheWrite": "cache_write_mtok",
}
"""Prices of the catalog by the fields of a model, both in dollars per million tokens."""
MILLIONTH: Final = Decimal("0.000001")
"""Smallest price that a model can have."""
PRICE_LIMIT: Final = 1_000_000
"""Dollars below which the price of a model is."""


class CatalogPrice(Struct, frozen=True):
    """Price of a model in the catalog."""

    entry: str
    """Provider and model of the catalog."""
    price: Mapping[str, str]
    """Fields of `price` of a model."""
    problem: str = ""
    """Reason why a model can't have this price; empty if it can."""


class PriceCatalog(Protocol):
    """Prices by the address of a provider and its name of the model."""

    def find(self, base_url: str, vendor_model_id: str, today: date) -> CatalogPrice | None:
        """Return the price of a model of a provider on a day; None if the catalog lacks the address or the model."""


def open_catalog(path: Path | None) -> PriceCatalog:
    """Return the prices of a file, or for None those of the installed package.

    Raises `CommandError` without the package or for a file in another format, and `OSError`.
    """
    if path is not None:
        return FileCatalog(path, _read_providers(path))
    try:
        snapshots = importlib.import_module("genai_prices.data_snapshot")
    except ImportError as error:
        raise CommandError(
            "The package genai-prices is not installed: install it beside pilotflame"
            " (pip install genai-prices), or name its published file with --from",
            exit_codes.USAGE,
        ) from error
    return PackageCatalog(snapshots.get_snapshot())


class PackageCatalog:
    """Catalog of the package, which matches addresses and names itself."""

    def __init__(self, snapshot: Any) -> None:  # noqa: ANN401 - of a package that need not be there
        self._snapshot = snapshot

    def find(self, base_url: str, vendor_model_id: str, today: date) -> CatalogPrice | None:
        """Return the price of a model of a provider on a day; None if the catalog lacks the address or the model."""
        try:
            provider, model = self._snapshot.find_provider_model(vendor_model_id, None, None, base_url)
        except LookupError:
            return None
        found = model.prices if isinstance(model.prices, list) else [model]
        periods = [
            (_read_constraint(vars(one.constraint) if getattr(one, "constraint", None) else None), one.prices)
            for one in found
        ]
        values = [
            (constraint, {key: getattr(prices, key) for key in KEYS.values()})
            for constraint, prices in periods
        ]
        return _build_price(f"{provider.id}/{model.id}", values, today)


class FileCatalog:
    """Catalog of a file: a list of providers with their models."""

    def __init__(self, path: Path, providers: Sequence[Mapping[str, Any]]) -> None:
        """`path` is that of the file, for errors."""
        self._path = path
        self._providers = providers

    def find(self, base_url: str, vendor_model_id: str, today: date) -> CatalogPrice | None:
        """Return the price of a model of a provider on a day; None if the catalog lacks the address or the model.

        Raises `CommandError` for an entry in another format.
        """
        with _refuse_other_formats(self._path):
            return self._find(base_url, vendor_model_id, today)

    def _find(self, base_url: str, vendor_model_id: str, today: date) -> CatalogPrice | None:
        """Find a price as `find`; an entry in another format raises the error of the failed access."""
        for provider in self._providers:
            if not re.match(provider["api_pattern"], base_url):
                continue
            for model in provider["models"]:
                if _is_match(model["match"], vendor_model_id):
                    found = model["prices"]
                    periods = found if isinstance(found, list) else [{"prices": found}]
                    values = [(_read_constraint(one.get("constraint")), one["prices"]) for one in periods]
                    return _build_price(f"{provider['id']}/{model['id']}", values, today)
            return None
        return None


def _read_providers(path: Path) -> Sequence[Mapping[str, Any]]:
    """Return the providers of a file; raises `CommandError` unless it has the published format, and `OSError`."""
    with _refuse_other_formats(path):
        found = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
        if not isinstance(found, list):
            raise TypeError("the providers are no list")
        for provider in found:
            re.compile(provider["api_pattern"])
            for model in provider["models"]:
                _is_match(model["match"], "")
                model["id"], model["prices"], provider["id"]
    providers: Sequence[Mapping[str, Any]] = found
    return providers


@contextmanager
def _refuse_other_formats(path: Path) -> Iterator[None]:
    """Raise `CommandError` for errors of the block, which reads values of this file that may be in another format."""
    try:
        yield
    except (
        *(ValueError, TypeError, LookupError, AttributeError),
        *(ArithmeticError, RecursionError, re.error),
    ) as error:
        message = f"{path} is no list of prices in the format of genai-prices (prices/data.json)"
        raise CommandError(message, exit_codes.USAGE) from error


_MATCHES: Final[Mapping[str, Callable[[str, str], bool]]] = {
    "equals": lambda text, part: text == part.lower(),
    "starts_with": lambda text, part: text.startswith(part.lower()),
    "ends_with": lambda text, part: text.endswith(part.lower()),
    "contains": lambda text, part: part.lower() in text,
    "regex": lambda text, part: re.search(part, text) is not None,
}


def _is_match(rule: Mapping[str, Any], text: str) -> bool:
    """Return whether a rule of the catalog matches a name; upper and lower case are the same.

    Raises `KeyError` for an unknown kind of rule.
    """
    ((kind, argument),) = rule.items()
    if kind in {"or", "and"}:
        results = [_is_match(one, text) for one in argument]
        return any(results) if kind == "or" else all(results)
    return _MATCHES[kind](text.lower(), argument)


class _Constraint(Struct, frozen=True):
    """Condition of a price: a first day, or hours of the day; none of both always holds."""

    start: date | None = None
    is_of_day: bool = False


def _read_constraint(stored: Mapping[str, Any] | None) -> _Constraint:
    """Return the condition of a price from the catalog: a first day, or if it has none, a time of day.

    A price without a stored condition (None or empty) always applies.
    """
    if not stored:
        return _Constraint()
    start = stored.get("start_date")
    if start is None:
        return _Constraint(is_of_day=True)
    return _Constraint(start if isinstance(start, date) else date.fromisoformat(start))


def _choose_period(
    periods: Sequence[tuple[_Constraint, Mapping[str, Any]]], today: date
) -> tuple[Mapping[str, Any], str]:
    """Return the prices of the last period that has begun, else of the first,
    and the reason if they depend on the hour.

    The reason is empty if they don't.
    """
    problem = ""
    for condition, prices in reversed(periods):
        if condition.is_of_day:
            problem = "it depends on the time of day"
        elif condition.start is None or condition.start <= today:
            return prices, problem
    return periods[0][1], problem


def _build_price(
    entry: str, periods: Sequence[tuple[_Constraint, Mapping[str, Any]]], today: date
) -> CatalogPrice:
    """Return the price of the last period that has begun, under the catalog's name `entry`; its `problem` is set if
    the price of a model can't express it.
    """
    values, problem = _choose_period(periods, today)
    price = {}
    for name, key in KEYS.items():
        value = values.get(key)
        base = value["base"] if isinstance(value, Mapping) else getattr(value, "base", value)
        if base is None:
            continue
        if base is not value:
            problem = "it depends on the length of the input"
        text = _format_price(base)
        if text is None:
            problem = f"{key} is no price"
        else:
            price[name] = text
    if not {"input", "output"} <= price.keys():
        problem = "it is not by input and output tokens"
    return CatalogPrice(entry, price, problem)


def _format_price(value: object) -> str | None:
    """Return a price in dollars as text, rounded up to a millionth; None for other values, and from 1,000,000 on."""
    try:
        price = Decimal(str(value)).quantize(MILLIONTH, ROUND_UP)
        is_price = 0 <= price < PRICE_LIMIT
    except InvalidOperation:
        return None
    return f"{abs(price).normalize():f}" if is_price else None
