"""Page of the methods of the Python SDK, from its client."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from pilotflame_sdk import Client, Run

HEAD = """# Methods of the Python SDK
`make docs` generates this page from the client of `pilotflame_sdk`; the [Python SDK](sdk.md) has examples.
`AsyncClient` has the same methods, awaited, except for those that return an `Iterator`: use `async for`.
Types of answers are in `pilotflame_sdk.types`, and editors show the types of arguments.
"""
TABLE_HEAD = ["| method | answer | meaning |", "| --- | --- | --- |"]


def build_page() -> str:
    """Return the text of the page."""
    sections = [
        _write_section("`Client(...)`", "client.", Client),
        _write_section("`Run`", "run.", Run),
        *(
            _write_section(f"`client.{name}`", "", _resource_class(member))
            for name, member in inspect.getmembers(Client)
            if isinstance(member, cached_property)
        ),
    ]
    return "\n".join([HEAD, *sections])


def _resource_class(member: cached_property[Any]) -> type:
    """Return the class of a resource, which the annotation of its property names."""
    resource: type = inspect.get_annotations(member.func, eval_str=True)["return"]
    return resource


def _write_section(title: str, prefix: str, owner: type) -> str:
    rows = [_write_row(prefix, name, method) for name, method in _list_methods(owner)]
    return "\n".join([f"## {title}", *TABLE_HEAD, *rows, ""])


def _list_methods(owner: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the constructor of a client, and the public methods of a class without deprecated ones."""
    if owner is Client:
        yield "__init__", owner.__init__
    for name, method in inspect.getmembers(owner, inspect.isfunction):
        if not name.startswith("_") and not (method.__doc__ or "").startswith("Deprecated"):
            yield name, method


def _write_row(prefix: str, name: str, method: Callable[..., Any]) -> str:
    signature = inspect.signature(method)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in [*signature.parameters.values()][1:]
    ]
    plain = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    call = ("Client" if name == "__init__" else f"{prefix}{name}") + str(plain).replace("=ABSENT", "=…")
    answer = re.sub(r"\bt\.", "", str(signature.return_annotation)).replace("|", "\\|")
    meaning = " ".join((inspect.getdoc(method) or "").partition("\n\n")[0].split())
    return f"| `{call}` | `{answer}` | {meaning} |"
