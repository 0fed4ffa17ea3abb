"""Operations on numbers. Whole numbers stay exact; a text is never taken for a number."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import reduce
from math import ceil, floor, fsum
from typing import Final

from engine.operations.operation import Number, OperationError, number, operation
from engine.values import Json, kind

MAX_DECIMALS: Final = 15
MAX_MARK_LENGTH: Final = 10

_ROUNDING = Context(prec=400)
"""Enough digits for the largest number with the most decimals."""


@operation("add")
def add(first: Json, second: Json, *more: Json) -> Number:
    """Add numbers."""
    return _fold(operator.add, [first, second, *more], "concat joins texts")


@operation("subtract")
def subtract(first: Number, second: Number) -> Number:
    """Subtract the second number from the first."""
    return first - second


@operation("multiply")
def multiply(first: Json, second: Json, *more: Json) -> Number:
    """Multiply numbers."""
    return _fold(operator.mul, [first, second, *more], "to-number reads a number from a text")


@operation("divide")
def divide(dividend: Number, divisor: Number) -> Number:
    """Divide the first number by the second; whole numbers that divide evenly give a whole number."""
    if type(dividend) is int and type(divisor) is int and dividend % divisor == 0:
        return dividend // divisor
    return dividend / divisor


@operation("modulo")
def modulo(dividend: Number, divisor: Number) -> Number:
    """Return the remainder of a division, with the sign of the second number."""
    return dividend % divisor


@operation("round")
def rounded(value: Number, decimals: int = 0) -> Number:
    """Round a number, halves away from zero, to a number of decimals: 0 by default, negative for tens and more."""
    result = _to_decimals(value, decimals)
    return int(result) if decimals <= 0 or type(value) is int else float(result)


@operation("floor")
def rounded_down(value: Number) -> Number:
    """Round a number down to a whole number."""
    return floor(value)


@operation("ceil")
def rounded_up(value: Number) -> Number:
    """Round a number up to a whole number."""
    return ceil(value)


@operation("abs")
def absolute(value: Number) -> Number:
    """Return the absolute value of a number."""
    return abs(value)


@operation("min")
def least(first: Json, *more: Json) -> Number:
    """Return the smallest of several numbers, or of a list of numbers."""
    return min(_numbers(first, more) or _nothing())


@operation("max")
def greatest(first: Json, *more: Json) -> Number:
    """Return the largest of several numbers, or of a list of numbers."""
    return max(_numbers(first, more) or _nothing())


@operation("sum")
def total(first: Json, *more: Json) -> Number:
    """Add numbers, or a list of numbers; an empty list gives 0."""
    numbers = _numbers(first, more)
    return sum(numbers) if all(type(each) is int for each in numbers) else fsum(numbers)


@operation("format-number")
def format_number(value: Number, decimals: int = 0, group: str = ",", point: str = ".") -> str:
    """Format a number with a number of decimals, a separator of thousands and a decimal mark."""
    if decimals < 0:
        raise OperationError(f"writes 0 to {MAX_DECIMALS} decimals, not {decimals}")
    if max(len(group), len(point)) > MAX_MARK_LENGTH:
        raise OperationError(f"sets thousands and decimals apart with at most {MAX_MARK_LENGTH} characters")
    whole, _, fraction = f"{_to_decimals(value, decimals):,f}".partition(".")
    return whole.replace(",", group) + (point + fraction if fraction else "")


def _to_decimals(value: Number, decimals: int) -> Decimal:
    if abs(decimals) > MAX_DECIMALS:
        raise OperationError(f"rounds to at most {MAX_DECIMALS} decimals")
    return Decimal(repr(value)).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP, context=_ROUNDING)


def _fold(step: Callable[[Number, Number], Number], values: Sequence[Json], advice: str) -> Number:
    try:
        return reduce(step, map(number, values))
    except OperationError as error:
        hint = f": {advice}" if any(type(value) is str for value in values) else ""
        raise OperationError(f"needs numbers, not {' and '.join(map(kind, values))}{hint}") from error


def _numbers(first: Json, more: Sequence[Json]) -> list[Number]:
    values = first if type(first) is list and not more else [first, *more]
    return [number(value) for value in values]


def _nothing() -> list[Number]:
    raise OperationError("needs at least one number, not an empty list")
