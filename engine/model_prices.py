"""Prices of language models, and the cost of a call in whole nano-dollars."""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import msgspec

if TYPE_CHECKING:
    from engine.model_calls import TokenUsage

NANOS_PER_MILLIONTH: Final = 1_000
"""Nano-dollars per token for each dollar per million tokens."""

Price: TypeAlias = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[0-9]{1,6}([.][0-9]{1,6})?$",
        description="US dollars per million tokens, as a decimal text such as `0.25`",
    ),
]


class ModelPrice(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, forbid_unknown_fields=True):
    """Prices of a model in US dollars per million tokens, as decimal texts."""

    input: Price
    output: Price
    cache_read: Price | None = None
    """Price of input from the provider's cache; None for the price of other input."""
    cache_write: Price | None = None
    """Price of input that is written to the provider's cache; None for the price of other input."""


def compute_cost(usage: TokenUsage, price: ModelPrice) -> int:
    """Return the cost of a model call in nano-dollars (billionths of a dollar), rounded up.

    Prices are per million tokens. Cached input tokens have prices of their own, or else that of the input.
    """
    cached = min(usage.cache_read_tokens, usage.input_tokens)
    written = min(usage.cache_write_tokens, usage.input_tokens - cached)
    plain = usage.input_tokens - cached - written
    dollars = (
        plain * Decimal(price.input)
        + cached * Decimal(price.cache_read or price.input)
        + written * Decimal(price.cache_write or price.input)
        + usage.output_tokens * Decimal(price.output)
    )
    return int((dollars * NANOS_PER_MILLIONTH).to_integral_value(ROUND_CEILING))


def compute_most_cost(input_tokens: int, output_tokens: int, price: ModelPrice) -> int:
    """Return the upper bound of the cost of a model call in nano-dollars, whether or not its input is written to a
    cache.
    """
    dearest = max(Decimal(price.input), Decimal(price.cache_write or price.input))
    dollars = input_tokens * dearest + output_tokens * Decimal(price.output)
    return int((dollars * NANOS_PER_MILLIONTH).to_integral_value(ROUND_CEILING))


def show_cost(nanos: int | None) -> str | None:
    """Return a cost in nano-dollars as a decimal text in US dollars, without trailing zeros; None for None."""
    if nanos is None:
        return None
    text = f"{Decimal(nanos).scaleb(-9):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
