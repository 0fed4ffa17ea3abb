"""Alembic environment: one migration path for SQLite and PostgreSQL.

It uses the connection of `models.schema_migration`.
"""

from alembic import context
from sqlmodel import SQLModel

from models import access, execution, workflow  # noqa: F401 - their tables must be known to the metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
