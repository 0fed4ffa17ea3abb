"""Files after a power cut: everything reported as durable remains, by the worst rules of POSIX."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests import power_loss, preloads
from tests.power_loss import FileOperation, SimulatedDisk

SHA256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
WRITER = f"""
import asyncio, os, sys
from pathlib import Path
import msgspec
from engine.services import RunCaller
from journal.sqlite import sqlite_store
from journal.blobs.blob_storage import BlobLabel, BlobOwner
from journal.blobs.folder_storage import FolderBlobStorage
from models.database import Database, parse_url
from nodes.connections import sqlite_process
from nodes.connections.organization_folders import OrganizationFolders
from nodes.sandbox.frames import SqliteJob
from pilotflame import data_dir

folder = Path(sys.argv[1])

def say(what):
    print(what, os.stat(os.environ["FILE_RECORDER_LOG"]).st_size, flush=True)

async def put():
    owner, label = BlobOwner("org_1", "exec_1"), BlobLabel("text/plain", "")
    await FolderBlobStorage(folder / "blobs").put(owner, "{SHA256}", b"hello", label)
    say("blob")
    files = await OrganizationFolders(folder / "files").folder(RunCaller("org_1", "user_1", "wf_1", "exec_1", "exec_1"))
    await files.put("a/b/c.txt", b"hello", media_type="text/plain", timeout_seconds=60)
    say("file")

with data_dir.lock_folder(folder):
    data_dir.make_secret_key(folder)
    say("key")
    Database(parse_url(f"sqlite:///{{folder}}/database/pilotflame.db"))
    connection = sqlite_store._open_connection(str(folder / "database/pilotflame.db"))
    connection.execute("CREATE TABLE told (value TEXT)")
    for value in "abc":
        connection.execute("INSERT INTO told VALUES (?)", (value,))
        say(f"row-{{value}}")
    asyncio.run(put())
    for number, statement in enumerate(("CREATE TABLE told (value TEXT)", "INSERT INTO told VALUES ('a')")):
        job = SqliteJob(
            file=str(folder / "files/org_1/own.db"),
            own_files=[],
            max_file_bytes=1_000_000,
            statement=statement,
            values=msgspec.Raw(b"[]"),
            timeout_seconds=60,
            action="execute",
            max_rows=0,
            max_bytes=0,
            batch_rows=1,
        )
        sqlite_process.perform(msgspec.json.encode(job), None)
        say(f"own-{{number}}")
    (folder / "unsynced").write_bytes(b"hello")
    say("nothing")
    os._exit(0)  # as a power cut has it: nothing is closed, and no journal is tidied up
"""


class PowerLossRecord:
    """File operations of a process, with the positions at which it reported something as durable."""

    def __init__(self, root: Path, operations: list[FileOperation], said: dict[str, int]) -> None:
        self._root = root
        self._operations = operations
        self.said = said

    def disk(self, what: str) -> SimulatedDisk:
        """Return the disk at the time of a report."""
        disk = SimulatedDisk(self._root)
        for operation in self._operations:
            if operation.ends_at <= self.said[what]:
                disk.apply(operation)
        return disk


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> PowerLossRecord:
    library = preloads.compile_library(power_loss.RECORDER)
    if library is None:
        pytest.skip("there is no C compiler: nothing can record what a process does to its files")
    folder = tmp_path_factory.mktemp("disk")
    root, log = folder / "root", folder / "log"
    root.mkdir()
    written = subprocess.run(
        [sys.executable, "-c", WRITER, root / "server" / "data"],
        env={**os.environ, **power_loss.recorder_environment(library, root, log)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    said = {what: int(size) for what, size in (line.split() for line in written.stdout.splitlines())}
    return PowerLossRecord(root, [*power_loss.read_operations(log)], said)


def surviving_claims(data: Path) -> Iterator[str]:
    """Yield the reports whose data is in a data folder."""
    if (data / "secret.key").exists() and len((data / "secret.key").read_text().strip()) > 32:
        yield "key"
    if (data / "database/pilotflame.db").exists():
        with closing(sqlite3.connect(data / "database/pilotflame.db")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            if connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
                yield from (f"row-{value}" for (value,) in connection.execute("SELECT value FROM told"))
    if (data / "files/org_1/own.db").exists():
        with closing(sqlite3.connect(data / "files/org_1/own.db")) as connection:
            if connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
                yield "own-0"
                yield from ("own-1" for _ in connection.execute("SELECT value FROM told"))
    contents = {"blob": data / "blobs/org_1/exec_1" / SHA256, "file": data / "files/org_1/objects/a/b/c.txt"}
    yield from (
        name for name, path in contents.items() if path.exists() and path.read_bytes()[-5:] == b"hello"
    )


def test_durable_files_survive_a_power_cut_at_any_moment(record: PowerLossRecord, tmp_path: Path) -> None:
    for number, what in enumerate(record.said):
        for seed in (None, 1, 2):
            left = tmp_path / f"{what}-{seed}"
            left.mkdir()
            survives = power_loss.keep_nothing if seed is None else power_loss.keep_some(seed)
            record.disk(what).write_out(left, survives)
            assert {*list(record.said)[: number + 1]} - {"nothing"} <= {
                *surviving_claims(left / "server" / "data")
            }
    assert not (tmp_path / "nothing-None/server/data/unsynced").exists()
