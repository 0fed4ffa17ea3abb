"""Commands of the README do what it says."""

import asyncio
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import command_runs, databases
from tests.system.harness import COMMAND

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def _readme_section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _code_blocks(section: str, kind: str = "sh") -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asyncio.run(databases.create_data_folder(tmp_path_factory.mktemp("readme") / "data"))


@pytest.fixture(scope="module")
def dev(data: Path) -> Iterator[dict[str, str]]:
    """Start the server for the first time, like `make run`; yield the environment of the second terminal."""
    before = "/".join(_project_files())
    # The server and its commands talk to each other without the proxy.
    environment = {**os.environ, "PILOTFLAME_DATA_DIR": str(data), "http_proxy": "http://127.0.0.1:9"}
    arguments = ("dev", "--port", "0", "--example", "docs/examples/penguins.json")
    log = data.with_name("dev.log")
    with command_runs.run_command(*arguments, given=environment, log=log, folder=ROOT) as server:
        printed = server.says(r".*-input\.json\n")[0]
        address = re.search(r"http://127\.0\.0\.1:\d+", printed)
        key = re.search(r"sk-\w+", printed)
        assert address
        assert key
        yield {
            **os.environ,
            "PRINTED_ADDRESS": address[0],
            "PRINTED_KEY": key[0],
            "PRINTED": printed,
            "FILES": before,
        }
        assert server.stop() == 0


def _run(script: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _second_terminal(dev: dict[str, str]) -> str:
    """Return the commands of the quick start, for this server."""
    commands_shown = _code_blocks(_readme_section("Quick start"))[-1]
    return (
        f"export http_proxy=http://127.0.0.1:9\nexport PILOTFLAME_URL={dev['PRINTED_ADDRESS']}\n"
        + re.sub(r"sk-\.\.\..*", shlex.quote(dev["PRINTED_KEY"]), commands_shown)
    ).replace(".venv/bin/pilotflame", str(COMMAND))


def test_the_quick_start_prints_the_report_that_the_readme_shows(dev: dict[str, str]) -> None:
    (report,) = _code_blocks(_readme_section("Quick start"), kind="text")
    assert json.loads(_run(_second_terminal(dev), dev))["report"]["text"] == report.rstrip("\n")


def test_the_printed_command_runs_the_example(dev: dict[str, str]) -> None:
    commands_printed = dev["PRINTED"].partition("second terminal:\n")[2].partition("\n\n")[0]
    assert "Chinstrap on Dream: 68 penguins" in _run(commands_printed, dev)


def test_the_example_brings_its_input_to_the_form_of_the_dashboard(dev: dict[str, str]) -> None:
    api = f"curl -sS --noproxy '*' -H 'X-API-Key: {dev['PRINTED_KEY']}' {dev['PRINTED_ADDRESS']}/api/v1/workflows"
    (workflow,) = json.loads(_run(f"{api}?search=Penguin", dev))["workflows"]
    config = json.loads(_run(f"{api}/{workflow['id']}", dev))["config"]
    given = json.loads((ROOT / "docs" / "examples" / "penguins-input.json").read_text())
    assert config["exampleInput"] == given["triggerInputs"]


def test_the_lines_that_the_first_start_prints_work_as_they_stand(dev: dict[str, str]) -> None:
    lines = re.search(r"wait for its result:\n((?:  .*\n)+)", dev["PRINTED"])
    assert lines
    assert "Hello, world!" in _run(lines[1], dev)


def test_the_commands_of_the_readme_leave_nothing_in_the_checkout(dev: dict[str, str]) -> None:
    """Runs after the tests that execute the commands."""
    assert _project_files() == set(dev["FILES"].split("/"))


def _project_files() -> set[str]:
    """Return the names in the folders of the commands, except those that test tools create."""
    folders = (ROOT, ROOT / "docs", ROOT / "docs/examples")
    names = {file.name for folder in folders for file in folder.iterdir()}
    return {name for name in names if not name.startswith((".", "__"))}


def test_every_command_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", README)) <= targets
    for command in sorted(set(re.findall(r"pilotflame (\w+)", README)) - {"dev"}):
        assert command_runs.run(command, "--help", given=os.environ).returncode == 0, command
