"""Commands of the guides work unchanged, and get the answers shown."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.system import elapsed_time, harness
from tests.system.client import API_KEY

PROJECT = Path(__file__).parents[2]
GUIDES = {
    name: (PROJECT / f"docs/{name}.md").read_text()
    for name in ("events", "getting-started", "scale-to-zero", "testing", "triggers", "tutorials")
}
SENDERS = {
    name: (PROJECT / f"docs/senders/{name}.md").read_text()
    for name in ("github", "mail-server", "mailgun", "sendgrid", "ses", "slack", "stripe")
}
REQUESTS = re.compile(r"```sh\n(.*?)```\n```json\n(.*?)```", re.DOTALL)
"""Commands, and the shown part of the last answer."""
COPIED = re.compile(r"\b[a-z]+[_-]\.\.\.")
"""Placeholder of an id or a key, which readers copy from an answer into later commands."""
VARIABLES = "variables"
"""Only file that the test itself leaves behind."""
PAGES = GUIDES | SENDERS
EACH = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guides")


@pytest.fixture(scope="module")
async def url(folder: Path) -> AsyncIterator[str]:
    """Yield the address of the server of a reader who follows one page after the other."""
    async with harness.run_one_process(folder, LIFECYCLE_SECONDS="0.5") as deployment:
        yield deployment.url


@EACH
async def test_every_request_of_a_page_is_answered_as_it_shows(folder: Path, url: str, page: str) -> None:
    await walk(page, folder, url)


async def walk(page: str, folder: Path, url: str) -> None:
    """Send each request of a page, and compare the answers with those that it shows."""
    # Files that a reader has below the project's folder.
    project = folder / "project"
    project.mkdir(exist_ok=True)
    for name, target in (("docs", PROJECT / "docs"), (".pilotflame", folder)):
        if not (project / name).exists():
            (project / name).symlink_to(target)
    # With the `python3` of the tests: that of pyenv is a script, which starts a dozen processes to find it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "KEY": API_KEY, "API": f"{url}/api/v1"}
    copied: dict[str, str] = {}
    for commands, shown in REQUESTS.findall(page):
        script = COPIED.sub(partial(find_value, copied), commands)
        if elapsed_time.UNTIL_IT_SLEEPS.search(script):
            elapsed_time.age_by_a_minute(folder / "pilotflame.db")
        printed, environment = await asyncio.to_thread(run_commands, script, environment, project)
        *others, last = parse_documents(printed)
        copied = {}
        wrong = [other for other in others if "error" in other]
        wrong += find_differences(last, json.loads(shown), copied)
        assert not wrong, f"{script}\n{printed}\n\n{shown}"
    assert {file.name for file in project.iterdir()} == {"docs", ".pilotflame", VARIABLES}


def find_value(copied: dict[str, str], placeholder: re.Match[str]) -> str:
    return copied[placeholder[0]]


def run_commands(script: str, environment: dict[str, str], folder: Path) -> tuple[str, dict[str, str]]:
    """Run a block of commands in a shell; return its output and the shell variables after it."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{script}\nenv -0 >{VARIABLES}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, script + done.stdout + done.stderr
    variables = (folder / VARIABLES).read_text().split("\0")
    return done.stdout, dict(variable.split("=", 1) for variable in variables if variable)


def parse_documents(printed: str) -> list[Any]:
    """Return the concatenated JSON documents."""
    found, start = [], 0
    while start < len(printed):
        answer, start = json.JSONDecoder().raw_decode(printed, start)
        found.append(answer)
    return found


def find_differences(actual: Any, shown: Any, copied: dict[str, str], at: str = "") -> Iterator[str]:  # noqa: ANN401 - any JSON value
    """Yield differences between an answer and its shown part, which may omit fields; add copied values to
    `copied`.
    """
    if isinstance(shown, dict) and isinstance(actual, dict):
        for key, value in shown.items():
            yield from find_differences(actual.get(key), value, copied, f"{at}.{key}")
    elif isinstance(shown, list) and isinstance(actual, list) and len(shown) == len(actual):
        for index, value in enumerate(shown):
            yield from find_differences(actual[index], value, copied, f"{at}.{index}")
    elif isinstance(shown, str) and COPIED.fullmatch(shown):
        copied[shown] = str(actual)
        if not copied[shown].startswith(shown.removesuffix("...")):
            yield at
    elif actual != shown:
        yield at


@EACH
def test_every_command_of_a_page_has_an_answer_and_all_of_it_can_be_read_in_one_sitting(page: str) -> None:
    assert len(REQUESTS.findall(page)) == page.count("```sh\n")
    assert len(page.splitlines()) < 250
