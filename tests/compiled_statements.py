"""Compiled statements that all databases of a kind share in the process of the tests."""

from typing import Any, Final

from sqlalchemy.engine import Compiled, Dialect
from sqlalchemy.util import LRUCache

CAPACITY: Final = 5_000
"""Several times the number of statements of the server, so that none is compiled twice."""


class SharedStatements(LRUCache[tuple[Any, ...], Compiled]):
    """Cache of compiled statements by the kind of database.

    Keys of SQLAlchemy start with the dialect of an engine, which is no other engine's. Tests open hundreds of them,
    and each would compile the statements of its test again, which takes longer than to execute them.
    """

    def get(self, key: tuple[Any, ...], default: Any = None) -> Any:  # noqa: ANN401 - as LRUCache declares it
        """Return the compiled statement with a key of SQLAlchemy, or else the default."""
        return super().get(_share_key(key), default)

    def __setitem__(self, key: tuple[Any, ...], value: Compiled) -> None:
        """Keep a compiled statement under a key of SQLAlchemy."""
        super().__setitem__(_share_key(key), value)


def _share_key(key: tuple[Any, ...]) -> tuple[Any, ...]:
    dialect: Dialect = key[0]
    return (dialect.name, dialect.driver, *key[1:])
