"""Time of the database, in statements about tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from models.timestamps import HOST_TIME

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

NOW: Final = {
    "postgresql": "CAST(extract(epoch FROM now()) * 1000000 AS bigint)",
    "sqlite": ":now",
}
"""SQL of the present time in microseconds since 1970, by dialect; SQLite takes that of `host_time`."""


def host_time(connection: AsyncConnection) -> dict[str, int]:
    """Return the parameter of `NOW`."""
    return {} if connection.dialect.name == "postgresql" else {"now": HOST_TIME.microseconds()}
