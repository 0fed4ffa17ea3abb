"""Shell for commands, with a running server."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import httpx2

from tests import command_runs, databases
from tests.command_runs import command_environment

KEY = "sk-of-the-settings-0123"


@dataclass(frozen=True)
class CommandShell:
    """Folder and environment in which commands of `pilotflame` reach a running server."""

    given: dict[str, str]
    folder: Path

    def run(self, *arguments: str, **variables: str) -> CompletedProcess[str]:
        """Run a command to its end, with further variables, and return its exit code and outputs."""
        return command_runs.run(*arguments, given={**self.given, **variables})

    def output(self, *arguments: str) -> str:
        """Return the output of a command, which must succeed."""
        return command_runs.run_output(*arguments, given=self.given)

    def json(self, *arguments: str) -> Any:  # noqa: ANN401 - any JSON
        """Return the JSON that a command prints, which must succeed."""
        return json.loads(self.output(*arguments))

    def file(self, name: str, content: str) -> str:
        """Write a file in the folder, in one step for readers that watch it, and return its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_text(content)
        part.replace(path)
        return str(path)

    def apply(self, definition: dict[str, Any]) -> str:
        """Create or update a workflow by the command `apply`, and return its id."""
        return self.output("apply", self.file(f"{definition['name']}.json", json.dumps(definition)))

    def api(self, path: str, key: str = KEY) -> httpx2.Response:
        """Send a GET request to the server itself, and return the answer of any status."""
        url = self.given["PILOTFLAME_URL"] + path
        return httpx2.get(url, headers={"X-API-Key": key}, trust_env=False)


@contextmanager
def open_shell(folder: Path, **variables: str) -> Iterator[CommandShell]:
    """Run `pilotflame dev` with further variables during the block, and yield a shell that reaches it;
    it must stop with 0.
    """
    data = folder / "data"
    asyncio.run(databases.create_data_folder(data))
    given = command_environment(data, BOOTSTRAP_API_KEY=KEY, METRICS_PORT="0", METRICS_WORKFLOWS="1000")
    log = folder / "log"
    with command_runs.run_command("dev", "--port", "0", given={**given, **variables}, log=log) as dev:
        address = dev.says(r"Pilotflame runs on (\S+)")[1]
        yield CommandShell({**given, "PILOTFLAME_URL": address, "PILOTFLAME_API_KEY": KEY}, folder)
        assert dev.stop() == 0
