"""Databases of earlier releases: files in a folder per revision and kind, and how they become databases again."""

from __future__ import annotations

import gzip
import io
import json
import re
import sqlite3
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, TypeAlias
from uuid import uuid4

import asyncpg

from tests import command_runs
from tests.services import PostgresServer

FOLDER: Final = Path(__file__).parent
KINDS: Final = ("sqlite", "postgresql")
SECRET_KEY: Final = "the secret of the upgrade fixtures, which protects nothing"
API_KEY: Final = "sk-upgrade-fixtures-0123456789"
LEDGER: Final = "http://ledger.invalid"
CALLBACKS: Final = "http://callbacks.invalid"
"""Placeholder for the address that runs call, which differs in every test."""
FILE: Final = "pilotflame.db"
Addresses: TypeAlias = Mapping[str, str]
NOWHERE: Final[Addresses] = {}
_MOMENT: Final = re.compile(r"(^|_)(at|until)$")
_OTHER_MOMENTS: Final = frozenset({("execution", "rank"), ("event_wait", "since")})
_OF_OTHER_VERSIONS: Final = re.compile(r"^(\\(un)?restrict .*|SET transaction_timeout .*)$", re.MULTILINE)
"""Lines of `pg_dump` that some servers, or the wire protocol, do not know."""


def environment(folder: Path, port: int, database_url: str | None, *, lease_seconds: float) -> dict[str, str]:
    """Return the environment of a server on a fixture; without a URL, the database is a file in the folder."""
    settings = {
        "SECRET_KEY": SECRET_KEY,
        "BOOTSTRAP_API_KEY": API_KEY,
        "PORT": str(port),
        "LEASE_SECONDS": str(lease_seconds),
        "SWEEP_SECONDS": "0.5",
        "OUTBOUND_ALLOWED_NETWORKS": "127.0.0.1/32",
    }
    if database_url is not None:
        settings["DATABASE_URL"] = database_url
    return command_runs.command_environment(folder, **settings)


@dataclass(frozen=True)
class Manifest:
    """Facts about a database that its rows don't contain."""

    made_at: int
    """Microseconds since 1970."""
    keys: Mapping[str, str]
    """API keys by user."""
    tokens: Mapping[str, str]
    """Trigger and event tokens by the workflow or provider."""
    workflows: Mapping[str, str]
    """Ids by name."""
    runs: Mapping[str, str]
    """Execution ids by state and cause."""
    others: Mapping[str, str]
    """Ids and hashes by name."""


@dataclass(frozen=True)
class Fixture:
    """Stored database of one revision and kind, with its blobs and manifest."""

    revision: str
    kind: str

    @property
    def folder(self) -> Path:
        return FOLDER / self.revision / self.kind

    @property
    def manifest(self) -> Manifest:
        return Manifest(**json.loads((self.folder / "manifest.json").read_text()))

    def write(self, dump: str, data_folder: Path, manifest: Manifest, addresses: Addresses) -> None:
        """Store a dump of a database, the blobs of a data folder and the manifest; `addresses` become placeholders."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = _OF_OTHER_VERSIONS.sub("", dump)
        for placeholder, address in addresses.items():
            text = text.replace(address, placeholder)
        (self.folder / "database.sql.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        (self.folder / "blobs.tar.gz").write_bytes(_pack(data_folder / "blobs"))
        (self.folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2) + "\n")

    def restore_blobs(self, data_folder: Path) -> None:
        """Extract the blobs into a data folder."""
        with tarfile.open(self.folder / "blobs.tar.gz") as archive:
            archive.extractall(data_folder, filter="data")

    def statements(self, addresses: Addresses) -> str:
        """Return the SQL statements of the database, with `addresses` in place of placeholders."""
        text = gzip.decompress((self.folder / "database.sql.gz").read_bytes()).decode()
        for placeholder, address in addresses.items():
            text = text.replace(placeholder, address)
        return text


async def restore(fixture: Fixture, postgres: PostgresServer, folder: Path, addresses: Addresses) -> str:
    """Restore the database, and its blobs in a data folder, as if they were left a moment ago;
    return the URL of the database.
    """
    fixture.restore_blobs(folder)
    if fixture.kind == "postgresql":
        return await restore_postgresql(fixture, postgres, addresses)
    return restore_sqlite(fixture, folder / FILE, addresses)


def restore_sqlite(fixture: Fixture, file: Path, addresses: Addresses = NOWHERE) -> str:
    """Restore an SQLite file without the blobs; return its URL."""
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.executescript(fixture.statements(addresses))
        tables = [
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        columns = [
            (table, name)
            for table in tables
            for _, name, type_, *_ in connection.execute(f"PRAGMA table_info({table})")
            if type_ == "BIGINT"
        ]
        connection.executescript(";".join(_updates(columns, fixture.manifest)))
    return f"sqlite:///{file}"


async def restore_postgresql(
    fixture: Fixture, postgres: PostgresServer, addresses: Addresses = NOWHERE
) -> str:
    """Restore a PostgreSQL database without the blobs; return its URL."""
    url = await postgres.create_database(f"upgrade_{uuid4().hex}", template="template0")
    connection = await asyncpg.connect(url.replace("+asyncpg", "", 1))
    try:
        await connection.execute(fixture.statements(addresses))
        rows = await connection.fetch(
            "SELECT table_name, column_name FROM information_schema.columns"
            " WHERE table_schema = 'public' AND data_type = 'bigint'"
        )
        columns = [(str(table), str(column)) for table, column in rows]
        await connection.execute("SET search_path = public")
        await connection.execute(";".join(_updates(columns, fixture.manifest)))
    finally:
        await connection.close()
    return url


def _updates(columns: list[tuple[str, str]], manifest: Manifest) -> Iterator[str]:
    """Yield statements that shift all times of the rows, so that leases, deadlines and retention keep their
    distance from now.
    """
    passed = time.time_ns() // 1_000 - manifest.made_at
    for table, column in columns:
        if _MOMENT.search(column) or (table, column) in _OTHER_MOMENTS:
            yield f'UPDATE "{table}" SET "{column}" = "{column}" + {passed} WHERE "{column}" IS NOT NULL'


def _pack(folder: Path) -> bytes:
    """Return a folder as a compressed archive that has the same bytes on each machine."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.add(file, file.relative_to(folder.parent), recursive=False, filter=_anonymous)
    return gzip.compress(packed.getvalue(), mtime=0)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
