"""Upgrade and roll-back between the previous version and this one, under load, on both databases.

The previous version is the newest tag before this commit. Without tags it is the oldest commit whose code may still use
the tables.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from docs.tables import ROOT
from tests.command_runs import COMMAND

if TYPE_CHECKING:
    from tests.system.processes import SystemProcess

MIGRATIONS: Final = ROOT / "models/migrations/versions"
OLDEST: Final = re.compile(r"^\s*_support_from\(\"?(\w+)\"?\)", re.MULTILINE)


class NoPreviousVersion(Exception):
    """The history of this checkout has no version to upgrade from: fetch it, or leave out upgrades by `--only`."""


def find_previous() -> str:
    """Return the tag or commit of the previous version; raises `NoPreviousVersion`."""
    tag = _git("describe", "--tags", "--abbrev=0", "--match", "v*", "HEAD^")
    if tag:
        return tag
    added = _git(
        "log", "--diff-filter=A", "--format=%H", "--", f"models/migrations/versions/{_oldest_revision()}_*.py"
    )
    if not added:
        raise NoPreviousVersion(NoPreviousVersion.__doc__)
    return added.splitlines()[-1]


def _oldest_revision() -> str:
    """Return the newest revision that older code can't use; raises `NoPreviousVersion` if there is none."""
    found = [path.name[:4] for path in sorted(MIGRATIONS.glob("*.py")) if OLDEST.search(path.read_text())]
    if not found:
        raise NoPreviousVersion(NoPreviousVersion.__doc__)
    return found[-1]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def extract(reference: str, folder: Path) -> Path:
    """Extract the code of a tag or commit into a new folder `previous` in `folder`, and return that."""
    code = folder / "previous"
    code.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", reference], capture_output=True, check=True
    ).stdout
    subprocess.run(["tar", "--extract", "--directory", str(code)], input=archive, check=True)
    return code


def code_environment(code: Path) -> dict[str, str]:
    """Return the environment variables of a process that runs the code of a folder."""
    return {"PYTHONPATH": str(code)}


async def migrate_with(code: Path, environment: Mapping[str, str]) -> None:
    """Create the tables of a new database by the code of a folder; raises RuntimeError if that fails."""
    await migrate({**environment, **code_environment(code)})


async def migrate(environment: Mapping[str, str]) -> None:
    """Run `pilotflame migrate` as a process with this environment; raises RuntimeError if that fails."""
    process = await asyncio.create_subprocess_exec(
        str(COMMAND),
        "migrate",
        env={**environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"pilotflame migrate failed: {output.decode()}")


def with_own_code(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment changed so that a process runs the code of this checkout."""
    kept = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    inherited = os.environ.get("PYTHONPATH")
    return {**kept, "PYTHONPATH": inherited} if inherited else kept


async def restart_with(process: SystemProcess, code: Path | None) -> None:
    """Stop a process by SIGTERM and start it with the code of a folder, or with this checkout's for None."""
    own = with_own_code(process.environment)
    process.environment = own if code is None else {**own, **code_environment(code)}
    process.terminate()
    await process.exit_code()
    process.ensure_started()
