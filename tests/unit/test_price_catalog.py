"""Public prices of language models, from a file and from the package."""

from __future__ import annotations

import json
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pilotflame.command_error import CommandError
from pilotflame.price_catalog import open_catalog

TODAY = date(2026, 11, 29)
URL = "https://api.example.com/v1"
FLAT = {"input_mtok": 0.25, "output_mtok": 2, "cache_read_mtok": 0.025, "input_audio_mtok": 3}
MODELS: list[dict[str, Any]] = [
    {"id": "small", "match": {"or": [{"equals": "Small-1"}, {"starts_with": "small-1-"}]}, "prices": FLAT},
    {
        "id": "dated",
        "match": {"and": [{"contains": "dated"}, {"ends_with": "-2"}]},
        "prices": [
            {"prices": {"input_mtok": 9, "output_mtok": 9}},
            {"constraint": {"start_date": "2026-03-13"}, "prices": {"input_mtok": 1, "output_mtok": 2}},
            {"constraint": {"start_date": "2099-01-01"}, "prices": {"input_mtok": 7, "output_mtok": 7}},
        ],
    },
    {
        "id": "nightly",
        "match": {"regex": "^night"},
        "prices": [
            {"prices": {"input_mtok": 2, "output_mtok": 4}},
            {
                "constraint": {"start_time": "00:30:00Z", "end_time": "16:30:00Z"},
                "prices": {"input_mtok": 1, "output_mtok": 2},
            },
        ],
    },
    {
        "id": "long",
        "match": {"equals": "long"},
        "prices": {
            "input_mtok": {"base": 3, "tiers": [{"start": 200000, "price": 6}]},
            "output_mtok": {"base": 15, "tiers": [{"start": 200000, "price": 22.5}]},
        },
    },
    {"id": "vectors", "match": {"equals": "vectors"}, "prices": {"input_mtok": 0.0000001}},
]


def write_file(folder: Path) -> Path:
    """Write a file in the published format."""
    path = folder / "data.json"
    path.write_text(
        json.dumps(
            [
                {"id": "other", "name": "Other", "api_pattern": r"https://api\.other\.com", "models": []},
                {
                    "id": "example",
                    "name": "Example",
                    "api_pattern": r"https://api\.example\.com",
                    "models": MODELS,
                },
            ]
        )
    )
    return path


@pytest.mark.parametrize(
    ("model", "entry", "price", "problem"),
    [
        ("small-1", "small", {"input": "0.25", "output": "2", "cacheRead": "0.025"}, ""),
        ("small-1-2026", "small", {"input": "0.25", "output": "2", "cacheRead": "0.025"}, ""),
        ("dated-2", "dated", {"input": "1", "output": "2"}, ""),
        ("night-owl", "nightly", {"input": "2", "output": "4"}, "it depends on the time of day"),
        ("long", "long", {"input": "3", "output": "15"}, "it depends on the length of the input"),
        ("vectors", "vectors", {"input": "0.000001"}, "it is not by input and output tokens"),
    ],
)
def test_a_file_has_the_price_of_a_day(
    tmp_path: Path, model: str, entry: str, price: dict[str, str], problem: str
) -> None:
    found = open_catalog(write_file(tmp_path)).find(URL, model, TODAY)
    assert found is not None
    assert (found.entry, found.price, found.problem) == (f"example/{entry}", price, problem)


def test_a_price_belongs_to_the_address_of_its_provider(tmp_path: Path) -> None:
    catalog = open_catalog(write_file(tmp_path))
    for url, model in (
        ("https://api.other.com/v1", "small-1"),
        ("http://10.0.0.5", "small-1"),
        (URL, "tiny"),
    ):
        assert catalog.find(url, model, TODAY) is None


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "{}",
        "[1]",
        '[{"api_pattern": "("}]',
        '[{"id": "a", "api_pattern": "x", "models": [{"id": "b"}]}]',
        '[{"id": "a", "api_pattern": "x{99999999999999}", "models": []}]',
        '[{"id": "a", "api_pattern": "x", "models": [{"id": "b", "match": "b", "prices": {}}]}]',
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(CommandError, match="format of genai-prices"):
        open_catalog(path)


@pytest.mark.parametrize(
    "prices",
    [
        "5",
        "[]",
        '[{"constraint": "soon", "prices": {}}]',
        '[{"constraint": {"start_date": "soon"}, "prices": {}}]',
        '{"input_mtok": {"tiers": []}}',
        '{"input_mtok": 1E99999999999999999999}',
    ],
)
def test_a_price_in_another_format_is_refused(tmp_path: Path, prices: str) -> None:
    path = tmp_path / "data.json"
    model = f'{{"id": "b", "match": {{"equals": "small"}}, "prices": {prices}}}'
    path.write_text(f'[{{"id": "a", "api_pattern": "https", "models": [{model}]}}]')
    with pytest.raises(CommandError, match="format of genai-prices"):
        open_catalog(path).find(URL, "small", TODAY)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "-1", "1000000", "true", '"soon"'])
def test_a_number_that_is_no_price_is_left_alone(tmp_path: Path, value: str) -> None:
    path = tmp_path / "data.json"
    prices = f'{{"input_mtok": 1, "output_mtok": 2, "cache_read_mtok": {value}}}'
    model = f'{{"id": "b", "match": {{"equals": "small"}}, "prices": {prices}}}'
    path.write_text(f'[{{"id": "a", "api_pattern": "https", "models": [{model}]}}]')
    found = open_catalog(path).find(URL, "small", TODAY)
    assert found is not None
    assert (found.price, found.problem) == ({"input": "1", "output": "2"}, "cache_read_mtok is no price")


def test_the_package_finds_addresses_and_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its objects have attributes in place of fields, and decimals."""

    def build_prices(**values: object) -> SimpleNamespace:
        missing = dict.fromkeys(("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok"))
        return SimpleNamespace(**{**missing, **values})

    tiered = SimpleNamespace(base=Decimal(5), tiers=[])
    periods = [
        SimpleNamespace(constraint=None, prices=build_prices(input_mtok=tiered, output_mtok=Decimal(25))),
        SimpleNamespace(
            constraint=SimpleNamespace(start_date=date(2026, 3, 13)),
            prices=build_prices(input_mtok=Decimal("5.0"), output_mtok=Decimal(25)),
        ),
    ]
    models = {"big": SimpleNamespace(id="big", prices=periods)}

    def find(model: str, provider: None, provider_id: None, url: str) -> tuple[SimpleNamespace, Any]:
        assert (provider, provider_id, url) == (None, None, URL)
        return SimpleNamespace(id="example"), models[model]

    module = ModuleType("genai_prices.data_snapshot")
    module.get_snapshot = lambda: SimpleNamespace(find_provider_model=find)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "genai_prices", ModuleType("genai_prices"))
    monkeypatch.setitem(sys.modules, "genai_prices.data_snapshot", module)
    catalog = open_catalog(None)
    found = catalog.find(URL, "big", TODAY)
    assert found is not None
    assert (found.entry, found.price, found.problem) == ("example/big", {"input": "5", "output": "25"}, "")
    earlier = catalog.find(URL, "big", date(2026, 3, 12))
    assert earlier is not None
    assert earlier.problem == "it depends on the length of the input"
    assert catalog.find(URL, "small", TODAY) is None


def test_without_the_package_a_file_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    with pytest.raises(CommandError, match="--from"):
        open_catalog(None)
