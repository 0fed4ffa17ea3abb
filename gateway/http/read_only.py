"""Read-only fields in request bodies: ignored when they equal the stored value, otherwise refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from gateway.http import errors
from gateway.http.wire import WireStruct

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.http.request import GatewayRequest

IGNORED: Final = frozenset({"updatedAt", "warnings"})
"""Fields that every change updates, or that only one answer has."""
CODE: Final = "read-only"


def require_same(given: Json, kind: type[WireStruct], shown: Callable[[], Mapping[str, Json]]) -> None:
    """Raise a 422 error for read-only fields of a body that differ from the object's current values.

    `kind` is the type of the body, which lists its read-only fields; `shown` returns the object as the API shows it,
    and is called only if needed. `updatedAt` and `warnings` are ignored.
    """
    found = [*_find_differing_fields(given, kind, shown)]
    if found:
        raise errors.invalid(problem for _, problem in found)


def warn_of_new(
    request: GatewayRequest, given: Json, kind: type[WireStruct], shown: Callable[[], Mapping[str, Json]]
) -> None:
    """Check read-only fields in the body of a new object, which is often a copied answer.

    Only those count that differ from the new object as the API shows it, which `shown` returns. Raises a 422 error for
    those that another route sets; those that the server sets only add a warning to the answer.
    """
    found = [*_find_differing_fields(given, kind, shown)]
    refused = [problem for name, problem in found if kind.read_only[name]]
    if refused:
        raise errors.invalid(refused)
    request.warnings.extend(problem for _, problem in found)


def _find_differing_fields(
    given: Json, kind: type[WireStruct], shown: Callable[[], Mapping[str, Json]]
) -> Iterator[tuple[str, dict[str, Json]]]:
    """Yield name and problem of each read-only field of a body that differs from the object's current value.

    Nothing for a body that is no object.
    """
    if not isinstance(given, dict):
        return
    names = [name for name in kind.read_only if name in given and name not in IGNORED]
    if not names:
        return
    stored = shown()
    for name in names:
        if given[name] != stored.get(name):
            route = kind.read_only[name]
            hint = f"{route} changes it" if route else "the server sets it"
            yield name, errors.problem(name, CODE, f"{name} is read-only here: {hint}")
