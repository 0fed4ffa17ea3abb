"""What the guides tell their reader to send works as it stands, and is answered as they show."""

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Iterator
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
"""Commands, and what is shown of the answer to the last of them."""
COPIED = re.compile(r"\b[a-z]+[_-]\.\.\.")
"""How a guide shows an id or a key, which its reader copies from an answer into the commands after it."""
VARIABLES = "variables"
"""The one file that the test itself leaves."""
EACH = pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)


@EACH
async def test_every_request_of_a_guide_is_answered_as_it_shows(tmp_path: Path, guide: str) -> None:
    async with harness.run_one_process(tmp_path, LIFECYCLE_SECONDS="0.5") as deployment:
        await walk(guide, tmp_path, deployment.url)


async def test_every_request_of_the_pages_about_senders_is_answered_as_they_show(tmp_path: Path) -> None:
    async with harness.run_one_process(tmp_path) as deployment:
        for page in SENDERS.values():
            await walk(page, tmp_path, deployment.url)


async def walk(guide: str, folder: Path, url: str) -> None:
    """Send each request of a guide, and compare the answers with those that it shows."""
    # What a reader has below the project's folder.
    project = folder / "project"
    project.mkdir(exist_ok=True)
    for name, target in (("docs", PROJECT / "docs"), (".pilotflame", folder)):
        if not (project / name).exists():
            (project / name).symlink_to(target)
    environment = {**os.environ, "KEY": API_KEY, "API": f"{url}/api/v1"}
    copied: dict[str, str] = {}
    for commands, shown in REQUESTS.findall(guide):
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
    """Run a block of commands in a shell; return what it prints, and the variables that there are then."""
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
    """Return the JSON documents that stand one behind the other."""
    found, start = [], 0
    while start < len(printed):
        answer, start = json.JSONDecoder().raw_decode(printed, start)
        found.append(answer)
    return found


def find_differences(actual: Any, shown: Any, copied: dict[str, str], at: str = "") -> Iterator[str]:  # noqa: ANN401 - any JSON value
    """Say where an answer isn't what is shown of it, which may lack fields; what is to be copied goes to `copied`."""
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


@pytest.mark.parametrize("guide", [*GUIDES.values(), *SENDERS.values()], ids=[*GUIDES, *SENDERS])
def test_every_command_of_a_guide_has_an_answer_and_all_of_it_can_be_read_in_one_sitting(guide: str) -> None:
    assert len(REQUESTS.findall(guide)) == guide.count("```sh\n")
    assert len(guide.splitlines()) < 250
