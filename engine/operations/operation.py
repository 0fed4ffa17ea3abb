"""Operations: pure functions of JSON values with checked arguments and results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import Parameter, signature
from typing import Final, TypeAlias

from msgspec import Struct

from concurrency import offload
from engine.values import MAX_NUMBER, InvalidJson, Json, type_name

Number: TypeAlias = int | float
ArgumentConverter: TypeAlias = Callable[[Json], Json]

MAX_ARGUMENTS: Final = 100
INLINE_LENGTH: Final = 200_000
"""Maximum length of a text or list that is produced inline."""
MAX_LIST_LENGTH: Final = 1_000_000
MAX_TEXT_LENGTH: Final = 10_000_000


class OperationError(ValueError):
    """Invalid arguments of an operation; the message names the needed and the given types."""


class ExpressionOperation(Struct, frozen=True):
    """Entry of the table of operations."""

    name: str
    summary: str
    min_arguments: int
    max_arguments: int
    takes_first_found: bool
    """Whether arguments are rendered one by one until one isn't null; missing values before that are no
    error.
    """
    reads_all: bool
    """Whether it visits its arguments at any depth."""
    _function: Callable[..., Json]
    _converters: tuple[ArgumentConverter, ...]

    def takes(self, count: int) -> bool:
        return self.min_arguments <= count <= self.max_arguments

    @property
    def arity(self) -> str:
        """Number of arguments in words, for error messages and the documentation."""
        if self.min_arguments == self.max_arguments:
            return "1 argument" if self.min_arguments == 1 else f"{self.min_arguments} arguments"
        return f"{self.min_arguments} to {self.max_arguments} arguments"

    def apply(self, arguments: Sequence[Json]) -> Json:
        """Convert the arguments, of a permitted number, and compute the result.

        Raises `OperationError` for wrong types, division by zero, and results that are out of range or too large, and
        `BudgetExceeded` within `offload.try_inline`.
        """
        try:
            converted = [convert(given) for convert, given in zip(self._converters, arguments, strict=False)]
            result: Json = self._function(*converted)
        except ZeroDivisionError as error:
            raise OperationError("can't divide by zero") from error
        except OverflowError as error:
            raise OperationError("gives a result that is out of range") from error
        except InvalidJson as error:
            raise OperationError(error.message) from error
        _check_size(result)
        return result


def define_operation(
    name: str, *, takes_first_found: bool = False, reads_all: bool = False
) -> Callable[[Callable[..., Json]], ExpressionOperation]:
    """Return a decorator that turns a function into an operation of expressions.

    The parameters with their annotations define its arguments, and the first line of the docstring its
    summary. `takes_first_found` is for operations that stop at the first value found, `reads_all` for those
    that visit all of a value.
    """

    def make(function: Callable[..., Json]) -> ExpressionOperation:
        parameters = signature(function).parameters.values()
        return ExpressionOperation(
            name=name,
            summary=(function.__doc__ or "").strip().partition("\n")[0],
            min_arguments=sum(_is_required(parameter) for parameter in parameters),
            max_arguments=min(sum(map(_max_arguments, parameters)), MAX_ARGUMENTS),
            takes_first_found=takes_first_found,
            reads_all=reads_all,
            _function=function,
            _converters=tuple(_argument_converters(parameters)),
        )

    return make


def _is_required(parameter: Parameter) -> bool:
    return parameter.kind is not Parameter.VAR_POSITIONAL and parameter.default is Parameter.empty


def _max_arguments(parameter: Parameter) -> int:
    return MAX_ARGUMENTS if parameter.kind is Parameter.VAR_POSITIONAL else 1


def _argument_converters(parameters: Iterable[Parameter]) -> Iterator[ArgumentConverter]:
    """Yield the converter of each argument, by the annotation of its parameter; raises `KeyError` for another type."""
    for parameter in parameters:
        converter = _CONVERTERS[str(parameter.annotation)]
        yield from [converter] * _max_arguments(parameter)


# ── arguments ───────────────────────────────────────────────────────────────────────────────────────────────


def require_number(value: Json) -> Number:
    if type(value) is int or type(value) is float:
        return value
    raise OperationError(f"needs a number, not {type_name(value)}")


def require_whole_number(value: Json) -> int:
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    found = value if type(value) is float else type_name(value)
    raise OperationError(f"needs a whole number, not {found}")


def require_text(value: Json) -> str:
    if type(value) is str:
        return value
    raise OperationError(f"needs a text, not {type_name(value)}")


def require_list(value: Json) -> list[Json]:
    if type(value) is list:
        return value
    raise OperationError(f"needs a list, not {type_name(value)}")


def require_object(value: Json) -> dict[str, Json]:
    if type(value) is dict:
        return value
    raise OperationError(f"needs an object, not {type_name(value)}")


def _keep_value(value: Json) -> Json:
    return value


def _optional_converter(convert: ArgumentConverter) -> ArgumentConverter:
    return lambda value: None if value is None else convert(value)


_CONVERTERS: Final[Mapping[str, ArgumentConverter]] = {
    "Json": _keep_value,
    "Number": require_number,
    "dict[str, Json]": require_object,
    "int": require_whole_number,
    "int | None": _optional_converter(require_whole_number),
    "list[Json]": require_list,
    "str": require_text,
    "str | None": _optional_converter(require_text),
}


# ── results ─────────────────────────────────────────────────────────────────────────────────────────────────


def _check_size(result: Json) -> None:
    """Raise `OperationError` for a result that is too large: a number, a text, a list or an object."""
    if type(result) is int or type(result) is float:
        if not -MAX_NUMBER <= result <= MAX_NUMBER:
            raise OperationError("gives a number that is too large")
    elif type(result) is str:
        check_text_length(len(result))
    elif type(result) is list or type(result) is dict:
        check_list_length(len(result))


def check_text_length(length: int) -> None:
    """Raise `OperationError` for a text over ten million characters; over 200,000, `BudgetExceeded` within
    `offload.try_inline`.
    """
    if length > INLINE_LENGTH:
        offload.require_offloaded()
    if length > MAX_TEXT_LENGTH:
        raise OperationError(f"gives a text of more than {MAX_TEXT_LENGTH:,} characters")


def check_list_length(length: int) -> None:
    """Raise `OperationError` for a list over a million elements; over 200,000, `BudgetExceeded` within
    `offload.try_inline`.
    """
    if length > INLINE_LENGTH:
        offload.require_offloaded()
    if length > MAX_LIST_LENGTH:
        raise OperationError(f"gives more than {MAX_LIST_LENGTH:,} elements")
