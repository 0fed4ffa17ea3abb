"""Fixture `pilotflame` of pytest: a client of a real server, with an organization of its own for each test.

The server is `pilotflame dev` of this environment, started by the first test that needs it. The option
`--pilotflame-url`, or PILOTFLAME_TEST_URL, with the key in PILOTFLAME_TEST_API_KEY, names a running one instead, whose
organization all tests share.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from uuid import uuid4

import pytest

from pilotflame_sdk.client import Client

START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 20.0


class StartedServer:
    """Running `pilotflame dev` with its data in a folder."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which(
            "pilotflame", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        )
        if found is None:
            pytest.fail("the fixture `pilotflame` needs the command `pilotflame`, or PILOTFLAME_TEST_URL")
        self._command = found
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PILOTFLAME_")}
        self._environment = {
            **kept,
            "PILOTFLAME_DATA_DIR": str(folder / "data"),
            "PILOTFLAME_METRICS_PORT": "0",
            "PILOTFLAME_CONFIG": str(folder / "profiles.json"),
        }
        self._log = folder / "log"
        with self._log.open("wb") as sink:
            self._process = subprocess.Popen(  # noqa: S603 - the command of this environment
                [found, "dev", "--port", "0"], env=self._environment, stdout=sink, stderr=sink
            )
        self.url = self._await_address()

    def _await_address(self) -> str:
        """Return the address that the server prints at its start; fails the test if it doesn't within 60 seconds."""
        give_up_at = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up_at and self._process.poll() is None:
            said = re.search(r"Pilotflame runs on (\S+)", self._log.read_text(errors="replace"))
            if said:
                return said[1]
            time.sleep(0.05)
        self.stop()
        pytest.fail(f"`pilotflame dev` did not start: {self._log.read_text(errors='replace')}")

    def new_key(self) -> str:
        """Create an organization with an admin, and return the admin's API key."""
        name = f"test-{uuid4().hex[:12]}"
        organization = self._run("orgs", "create", name)
        user = self._run("users", "create", f"{name}@example.com", "--org", organization, "--role", "admin")
        return self._run("keys", "create", "--user", user, "--org", organization)

    def _run(self, *arguments: str) -> str:
        """Run a command of `pilotflame` on the server's data, and return the output without line ends."""
        done = subprocess.run(  # noqa: S603 - as above
            [self._command, *arguments], env=self._environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def stop(self) -> None:
        """End the server, by `kill` if it doesn't end within 20 seconds."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.hookimpl
def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--pilotflame-url`."""
    parser.addoption(
        "--pilotflame-url",
        metavar="URL",
        default=os.environ.get("PILOTFLAME_TEST_URL"),
        help="running Pilotflame server for the fixture `pilotflame`; its API key is in PILOTFLAME_TEST_API_KEY",
    )


@pytest.fixture(scope="session")
def pilotflame_server(pytestconfig: pytest.Config) -> Iterator[StartedServer | Mapping[str, str]]:
    """Start one server for all tests; or yield the one that `--pilotflame-url` names."""
    if url := pytestconfig.getoption("--pilotflame-url"):
        yield {"url": url, "api_key": os.environ.get("PILOTFLAME_TEST_API_KEY", "")}
        return
    with TemporaryDirectory() as folder:
        server = StartedServer(Path(folder))
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def pilotflame(pilotflame_server: StartedServer | Mapping[str, str]) -> Iterator[Client]:
    """Yield a client of a real server, as the admin of an organization of its own for each test."""
    if isinstance(pilotflame_server, StartedServer):
        url, key = pilotflame_server.url, pilotflame_server.new_key()
    else:
        url, key = pilotflame_server["url"], pilotflame_server["api_key"]
    with Client(url, key) as client:
        yield client
