"""Databases of a PostgreSQL server with all tables in them: migrated once, and copied from then on."""

from weakref import WeakSet

from models import migrating
from models.database import parse_url
from tests.services import PostgreSQL

TEMPLATE = "migrated"

_with_template: WeakSet[PostgreSQL] = WeakSet()


async def migrated(postgres: PostgreSQL, name: str) -> str:
    """Make a database and return its URL."""
    if postgres not in _with_template:
        await migrating.migrate(parse_url(await postgres.create_database(TEMPLATE)))
        _with_template.add(postgres)
    return await postgres.create_database(name, template=TEMPLATE)
