"""Data sources for the examples of nodes: each is a SQLite database with a few rows, whatever kind the node
names.
"""

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from engine.services import MailServerService, ObjectBucket, RunCaller, SqlDatabase, ToolServerService
from nodes.connections.data_source import ConnectionSource
from nodes.connections.data_source_connections import DataSourceConnections
from nodes.connections.data_source_policy import ConnectionPolicy

SOURCE_ID = "ds_001"
TABLES = """
CREATE TABLE orders (id INTEGER PRIMARY KEY, country TEXT, total REAL);
INSERT INTO orders VALUES (1, 'NO', 42.5), (2, 'NO', 7), (3, 'SE', 1);
"""


class SampleDataSources:
    """Lookup of data sources that knows one, an SQLite database, without access checks, and connections by it."""

    def __init__(self, folder: Path) -> None:
        self.connections = DataSourceConnections(self, ConnectionPolicy(files=folder))
        self._folder = folder

    async def find(self, caller: RunCaller, source_id: str) -> ConnectionSource:
        assert source_id == SOURCE_ID
        file = self._folder / caller.organization_id / "sample.db"
        if not file.exists():
            file.parent.mkdir()
            with closing(sqlite3.connect(file)) as connection:
                connection.executescript(TABLES)
        return ConnectionSource(source_id, caller.organization_id, "sqlite", 1, {"file": "sample.db"}, {})

    async def database(self, caller: RunCaller, source_id: str, type: str) -> SqlDatabase:  # noqa: A002 - the field's own word
        assert type in {"postgresql", "mysql", "sqlite"}
        return await self.connections.database(caller, source_id, "sqlite")

    async def bucket(self, caller: RunCaller, source_id: str) -> ObjectBucket:
        raise AssertionError(f"{caller} asked for the bucket of {source_id}")

    async def mail_server(self, caller: RunCaller, source_id: str) -> MailServerService:
        raise AssertionError(f"{caller} asked for the mail server {source_id}")

    async def tool_server(self, caller: RunCaller, source_id: str) -> ToolServerService:
        raise AssertionError(f"{caller} asked for the tool server {source_id}")

    async def headers(self, caller: RunCaller, source_id: str, url: str) -> Mapping[str, str]:
        raise AssertionError(f"{caller} asked for what {source_id} sends to {url}")
