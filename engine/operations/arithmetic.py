"""Operations on numbers. Whole numbers stay exact; texts are never converted to numbers implicitly."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import reduce
from math import ceil, floor, fsum
from typing import Final

from engine.operations.operation import Number, OperationError, define_operation, require_number
from engine.values import Json, type_name

MAX_DECIMALS: Final = 15
MAX_MARK_LENGTH: Final = 10

_ROUNDING = Context(prec=400)
"""Enough digits for the largest number with the most decimals."""


@define_operation("add")
def add(first: Json, second: Json, *more: Json) -> Number:
    """Add numbers.

    Raises `OperationError` for other values, with a hint to `concat`.
    """
    return _fold_numbers(operator.add, [first, second, *more], "concat joins texts")


@define_operation("subtract")
def subtract(first: Number, second: Number) -> Number:
    """Subtract the second number from the first."""
    return first - second


@define_operation("multiply")
def multiply(first: Json, second: Json, *more: Json) -> Number:
    """Multiply numbers.

    Raises `OperationError` for other values.
    """
    return _fold_numbers(operator.mul, [first, second, *more], "to-number reads a number from a text")


@define_operation("divide")
def divide(dividend: Number, divisor: Number) -> Number:
    """Divide the first number by the second; whole numbers that divide evenly give a whole number.

    Raises `ZeroDivisionError`, which `ExpressionOperation.apply` translates.
    """
    if type(dividend) is int and type(divisor) is int and dividend % divisor == 0:
        return dividend // divisor
    return dividend / divisor


@define_operation("modulo")
def compute_remainder(dividend: Number, divisor: Number) -> Number:
    """Return the remainder of a division, with the sign of the second number.

    Raises `ZeroDivisionError`, which `ExpressionOperation.apply` translates.
    """
    return dividend % divisor


@define_operation("round")
def round_number(value: Number, decimals: int = 0) -> Number:
    """Round a number, halves away from zero, to a number of decimals: 0 by default, negative for tens and more.

    Raises `OperationError` for more than 15 decimals.
    """
    result = _round_decimals(value, decimals)
    return int(result) if decimals <= 0 or type(value) is int else float(result)


@define_operation("floor")
def round_down(value: Number) -> Number:
    """Round a number down to a whole number."""
    return floor(value)


@define_operation("ceil")
def round_up(value: Number) -> Number:
    """Round a number up to a whole number."""
    return ceil(value)


@define_operation("abs")
def absolute_value(value: Number) -> Number:
    """Return the absolute value of a number."""
    return abs(value)


@define_operation("min")
def find_least(first: Json, *more: Json) -> Number:
    """Return the smallest of several numbers, or of a list of numbers.

    Raises `OperationError` for other values and for an empty list.
    """
    return min(_number_arguments(first, more) or _no_numbers_error())


@define_operation("max")
def find_greatest(first: Json, *more: Json) -> Number:
    """Return the largest of several numbers, or of a list of numbers.

    Raises `OperationError` for other values and for an empty list.
    """
    return max(_number_arguments(first, more) or _no_numbers_error())


@define_operation("sum")
def sum_numbers(first: Json, *more: Json) -> Number:
    """Add numbers, or a list of numbers; an empty list gives 0.

    Raises `OperationError` for other values.
    """
    numbers = _number_arguments(first, more)
    return sum(numbers) if all(type(each) is int for each in numbers) else fsum(numbers)


@define_operation("format-number")
def format_number(value: Number, decimals: int = 0, group: str = ",", point: str = ".") -> str:
    """Format a number with a number of decimals, a separator of thousands and a decimal mark.

    Halves are rounded away from zero. Raises `OperationError` for more than 15 or negative decimals, and for separators
    of more than ten characters.
    """
    if decimals < 0:
        raise OperationError(f"writes 0 to {MAX_DECIMALS} decimals, not {decimals}")
    if max(len(group), len(point)) > MAX_MARK_LENGTH:
        raise OperationError(f"accepts separators of at most {MAX_MARK_LENGTH} characters")
    whole, _, fraction = f"{_round_decimals(value, decimals):,f}".partition(".")
    return whole.replace(",", group) + (point + fraction if fraction else "")


def _round_decimals(value: Number, decimals: int) -> Decimal:
    if abs(decimals) > MAX_DECIMALS:
        raise OperationError(f"rounds to at most {MAX_DECIMALS} decimals")
    return Decimal(repr(value)).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP, context=_ROUNDING)


def _fold_numbers(step: Callable[[Number, Number], Number], values: Sequence[Json], advice: str) -> Number:
    try:
        return reduce(step, map(require_number, values))
    except OperationError as error:
        hint = f": {advice}" if any(type(value) is str for value in values) else ""
        raise OperationError(f"needs numbers, not {' and '.join(map(type_name, values))}{hint}") from error


def _number_arguments(first: Json, more: Sequence[Json]) -> list[Number]:
    values = first if type(first) is list and not more else [first, *more]
    return [require_number(value) for value in values]


def _no_numbers_error() -> list[Number]:
    raise OperationError("needs at least one number, not an empty list")
