"""Folders of workflows from the command line: apply, diff, export, conflicts and pruning."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml

from tests import command_runs
from tests.integration.command_shell import CommandShell, open_shell

TEXT = """
name: {name}
nodes:
  - {{id: start, type: manual}}
  - {{id: greet, type: template, config: {{text: "{text}"}}}}
connections:
  - {{source: start, target: greet}}
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandShell]:
    with open_shell(tmp_path_factory.mktemp("shell")) as shell:
        yield shell


def write(shell: CommandShell, folder: str, **texts: str) -> str:
    """Write a file for each workflow, and return the folder."""
    for name, text in texts.items():
        shell.file(f"{folder}/{name}.yaml", TEXT.format(name=f"{folder} {name}", text=text))
    return str(shell.folder / folder)


def test_a_folder_is_applied_compared_edited_and_pruned(shell: CommandShell) -> None:
    folder = write(shell, "shop", one="A", two="B")
    shell.file(
        "shop/deep/three.json", json.dumps({**yaml.safe_load(TEXT.format(name="shop three", text="C"))})
    )
    shell.file("shop/.hidden.yaml", "no workflow")
    shell.file("shop/notes.txt", "no workflow")
    chosen = ("-f", folder, "--set", "shop")
    planned = shell.run("apply", *chosen, "--dry-run")
    assert (planned.returncode, planned.stderr) == (0, "pilotflame: 3 create (dry run)\n")
    assert [line.split()[0] for line in planned.stdout.splitlines()[1:]] == ["create"] * 3
    assert shell.output("workflows", "list", "--search", "shop", "-o", "name") == ""
    assert shell.run("diff", "-f", folder, "--exit-code").returncode == 7
    assert len(shell.output("apply", *chosen).splitlines()) == 4
    same = shell.run("diff", *chosen, "--exit-code")
    assert (same.returncode, same.stdout, same.stderr) == (0, "", "pilotflame: 3 unchanged\n")

    write(shell, "shop", one="New")
    lines = shell.output("diff", *chosen).splitlines()
    assert lines[0] == "~ shop one (update)"
    assert lines[1].strip() == '~ node greet config: {"text": "A"} -> {"text": "New"}'
    shell.output("apply", shell.file("by-hand.yaml", TEXT.format(name="shop two", text="By hand")))
    write(shell, "shop", two="By file")
    refused = shell.run("apply", *chosen)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "! shop two (conflict: edited-since-apply)" in refused.stderr
    assert f"{folder}/two.yaml: 'shop two' was edited since it was applied" in refused.stderr
    assert shell.json("workflows", "get", "shop one")["nodes"][1]["config"] == {"text": "A"}
    forced = json.loads(shell.output("apply", *chosen, "--force", "-o", "json"))
    assert forced["counts"] == {"update": 2, "unchanged": 1}

    (shell.folder / "shop/one.yaml").unlink()
    assert shell.run("apply", *chosen, "--prune", "archive").stdout.split()[3:5] == ["archive", "shop"]
    assert shell.json("workflows", "get", "shop one")["status"] == "archived"
    refused = shell.run("apply", *chosen, "--prune", "delete")
    assert (refused.returncode, "delete 1 workflows (shop one)?" in refused.stderr) == (2, True)
    shell.output("apply", *chosen, "--prune", "delete", "--yes")
    assert shell.run("workflows", "get", "shop one").returncode == 1


def test_an_empty_folder_prunes_nothing_without_a_question(shell: CommandShell) -> None:
    folder = write(shell, "gone", one="A")
    chosen = ("-f", folder, "--set", "gone", "--prune", "archive")
    shell.output("apply", *chosen)
    (shell.folder / "gone/one.yaml").unlink()
    refused = shell.run("apply", *chosen)
    assert (refused.returncode, "archive 1 workflows (gone one)?" in refused.stderr) == (2, True)
    shell.output("apply", *chosen, "--yes")
    assert shell.json("workflows", "get", "gone one")["status"] == "archived"


def test_exported_files_apply_without_a_change_and_name_their_data_sources(shell: CommandShell) -> None:
    settings = json.dumps({"host": "db.example.com", "database": "d", "user": "u", "tls": "require"})
    command_runs.run_output(
        *("datasources", "create", "orders-db", "--type", "mysql", "--settings", settings),
        *("--secret-env", "password=DB_PASSWORD"),
        given={**shell.given, "DB_PASSWORD": "p"},
    )
    query = {
        "id": "query",
        "type": "mysql-source",
        "config": {"dataSource": "@orders-db", "query": "SELECT 1"},
    }
    definition = {
        "name": "Éxported",
        "nodes": [{"id": "start", "type": "manual"}, query],
        "connections": [{"source": "start", "target": "query"}],
    }
    source = shell.file("source/exported.json", json.dumps(definition))
    shell.output("apply", "-f", source)
    out = shell.folder / "out"
    assert shell.output("export", "Éxported", "-d", str(out)) == f"{out}/exported.yaml"
    written = yaml.safe_load((out / "exported.yaml").read_text())
    assert written["nodes"][1]["config"]["dataSource"] == "@orders-db"
    assert written["connections"] == [{"source": "start", "target": "query"}]
    assert shell.run("diff", "-f", str(out), "--exit-code").returncode == 0
    assert yaml.safe_load(shell.output("export", "Éxported")) == written


@pytest.mark.parametrize(
    ("text", "arguments", "code", "told"),
    [
        ("name: Bad\nnodes: [{id: a, type: sett}]", (), 1, "bad.yaml: nodes.0"),
        ("name: Bad\nnodse: []", (), 1, "bad.yaml: nodse"),
        ("- a list", (), 2, "bad.yaml is not a workflow"),
        ("name: Bad\nnodes: []", ("--prune", "archive"), 2, "--prune needs --set"),
    ],
    ids=range(4),
)
def test_a_wrong_file_is_named_and_nothing_is_applied(
    shell: CommandShell, text: str, arguments: tuple[str, ...], code: int, told: str
) -> None:
    file = shell.file("bad/bad.yaml", text)
    done = shell.run("apply", "-f", file, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr
    assert shell.output("workflows", "list", "--search", "Bad", "-o", "name") == ""
    assert shell.run("apply", "-f", str(shell.folder / "nowhere")).returncode == 2


def test_conflicts_of_a_dry_run_are_an_exit_code(shell: CommandShell) -> None:
    folder = write(shell, "clash", one="A")
    shell.output("apply", shell.file("clash.yaml", TEXT.format(name="clash one", text="By hand")))
    planned = shell.run("apply", "-f", folder, "--dry-run")
    assert (planned.returncode, planned.stdout.splitlines()[1].split()[0]) == (7, "conflict")
    assert shell.run("apply", "-f", folder, "--dry-run", "--force").returncode == 0


def test_warnings_are_printed_and_fail_if_it_is_strict(shell: CommandShell) -> None:
    text = TEXT.format(name="Warned", text="{{ nodes.start.x }} {{ nodes.gret.y }}")
    file = shell.file("warned.yaml", text)
    warning = r"pilotflame: Warned: greet: .* \(unresolved-mapping\): "
    refused = shell.run("apply", "-f", file, "--strict")
    assert (
        refused.returncode,
        refused.stdout,
        "warned.yaml: nodes.1: Workflow 'Warned'" in refused.stderr,
    ) == (
        *(1, ""),
        True,
    ), refused.stderr
    assert shell.output("workflows", "list", "--search", "Warned", "-o", "name") == ""
    for arguments, code in (
        (("-f", file, "--dry-run"), 0),
        (("-f", file), 0),
        ((file,), 0),
        ((file, "--strict"), 1),
    ):
        done = shell.run("apply", *arguments)
        assert (done.returncode, bool(re.search(warning, done.stderr))) == (code, True), done.stderr


def test_errors_of_one_file_name_the_file_and_the_workflow(shell: CommandShell) -> None:
    file = shell.file("wrong.yaml", "name: Wrong\nnodes: [{id: a, type: quux}]")
    for arguments in ((file,), ("-f", file)):
        done = shell.run("apply", *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert "wrong.yaml: " in done.stderr
        assert re.search(
            r"Workflow 'Wrong': There is no node type 'quux': did you mean \S+ or \S+ or \S+\?", done.stderr
        )
