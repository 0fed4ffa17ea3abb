"""Usage and cost of the language models that an execution has called, from the records of its spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.model_calls import ModelCallRecord, sum_cost, sum_usage
from engine.model_prices import show_cost
from gateway.http.wire import WireStruct
from json_text import decoding


class ModelUsageShape(WireStruct):
    """Tokens of calls of language models, and their cost. Tokens of caches and of reasoning are parts of the totals."""

    calls: int
    """Answers of models."""
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    is_estimated: bool
    """Whether a provider has reported no usage, so that the totals contain estimates."""
    cost: str | None
    """US dollars as a decimal text; null if the price of a called model is unknown."""


class ModelSumsShape(WireStruct):
    """Answered calls of language models that ended within a time: of all for admins, and of your own for others."""

    calls: int
    unpriced_calls: int
    """Calls of a model without a price, which `cost` doesn't contain."""
    input_tokens: int
    output_tokens: int
    cost: str
    """US dollars as a decimal text."""


def show_usage(texts: Iterable[str]) -> ModelUsageShape:
    """Return the total usage of language models from the JSON texts of the calls of several spans."""
    return sum_records([record for text in texts for record in decoding.decode(text, list[ModelCallRecord])])


def sum_records(records: Sequence[ModelCallRecord]) -> ModelUsageShape:
    """Return the total tokens and cost of calls of language models; the cost is None if the price of a called
    model is unknown.
    """
    total = sum_usage(records)
    return ModelUsageShape(
        calls=sum(record.usage is not None for record in records),
        input_tokens=total.input_tokens,
        output_tokens=total.output_tokens,
        cache_read_tokens=total.cache_read_tokens,
        cache_write_tokens=total.cache_write_tokens,
        reasoning_tokens=total.reasoning_tokens,
        is_estimated=total.is_estimated,
        cost=show_cost(sum_cost(records)),
    )
