"""Choice of the tests of the ordinary run; `--thorough` runs all.

A test of several kinds of database, or of several backends of scripts, is collected once for each. The ordinary run
keeps one of these variants, about half of all tests each kind, so that each part of the product meets both. A checksum
of the test's name chooses, so that new tests never change the choice for others. Tests marked `every_database` keep all
their variants: their subject is the statements and locks of a database, or they alone reach some statements. Tests
marked `thorough` are left out: they take long for the little that they protect beyond others. Tests marked `toolchain`
run programs of others for seconds, such as compilers, and are left out but with `--toolchains`.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nodes.sandbox.code.code_backend import CodeBackend

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

EVERY_DATABASE: Final = "every_database"
THOROUGH: Final = "thorough"
TOOLCHAIN: Final = "toolchain"
"""Names of the marks."""

DATABASES: Final = frozenset(
    {"sqlite", "postgresql", "SQLite", "PostgreSQL", "on_sqlite", "on_postgres", "on_serializable_postgres"}
)
"""Values of test parameters that name a kind of database."""


@dataclass
class RunExtent:
    """Extent of each test in a run."""

    is_thorough: bool = False


EXTENT: Final = RunExtent()
"""Extent of this run, for helpers that no fixture reaches."""


def find_left_out(items: Iterable[pytest.Item], *, with_toolchains: bool = False) -> list[pytest.Item]:
    """Return the collected tests that the ordinary run leaves out: thorough ones, those of toolchains
    unless asked for, and all variants of a test but one.
    """
    marks = (THOROUGH,) if with_toolchains else (THOROUGH, TOOLCHAIN)
    left_out: list[pytest.Item] = []
    variants: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if any(item.get_closest_marker(mark) is not None for mark in marks):
            left_out.append(item)
        elif (variant := _variant_of(item)) is not None:
            variants[item.nodeid.replace(variant, "", 1)].append(item)
    for name, group in variants.items():
        kept = group[checksum(name) % len(group)]
        left_out += [item for item in group if item is not kept]
    return left_out


def checksum(name: str) -> int:
    """Return a number for a name that is the same in every process, to choose a variant by."""
    return zlib.crc32(name.encode())


def _variant_of(item: pytest.Item) -> str | None:
    """Return the parameter of a test that names its database or script backend;
    None without one, or for `every_database`.
    """
    parameters = getattr(item, "callspec", None)
    if parameters is None or item.get_closest_marker(EVERY_DATABASE) is not None:
        return None
    return next((value for value in parameters.params.values() if _names_variant(value)), None)


def _names_variant(value: object) -> bool:
    # Members of other enumerations name dialects and types of data sources, which tests of these compare.
    return isinstance(value, CodeBackend) or (type(value) is str and value in DATABASES)
