"""Choice of the database of a test in the ordinary run: one of those that the test has, by the name of the test.

A test of several kinds of database is collected once for each. The ordinary run keeps one of these variants, about half
of all tests each kind, so that each part of the product meets both; `--thorough` keeps all. A checksum of the test's
name chooses, so that new tests never change the choice for others. Tests marked `every_database`, whose subject is
the statements and locks of a database, keep all their variants.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

EVERY_DATABASE: Final = "every_database"
"""Name of the mark."""

DATABASES: Final = frozenset(
    {"sqlite", "postgresql", "SQLite", "PostgreSQL", "on_sqlite", "on_postgres", "on_serializable_postgres"}
)
"""Values of test parameters that name a kind of database."""


def find_spare_variants(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Return the collected tests that the ordinary run leaves out, since it keeps another variant of each."""
    variants: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if (database := _database_of(item)) is not None:
            variants[item.nodeid.replace(database, "", 1)].append(item)
    spare: list[pytest.Item] = []
    for name, group in variants.items():
        kept = group[zlib.crc32(name.encode()) % len(group)]
        spare += [item for item in group if item is not kept]
    return spare


def _database_of(item: pytest.Item) -> str | None:
    """Return the parameter of a test that names its database; None without one, or if the test keeps all."""
    parameters = getattr(item, "callspec", None)
    if parameters is None or item.get_closest_marker(EVERY_DATABASE) is not None:
        return None
    return next((value for value in parameters.params.values() if _names_database(value)), None)


def _names_database(value: object) -> bool:
    # Members of enumerations name dialects and types of data sources, which tests of these compare.
    return type(value) is str and value in DATABASES
