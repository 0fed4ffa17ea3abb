"""Writes the parts of the documentation that say what the code says: `make docs` keeps them true."""

from __future__ import annotations

import ast
import inspect
import sys
from itertools import pairwise
from pathlib import Path

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from bridge.settings import RabbitmqBridgeSettings, RedisBridgeSettings, SqsBridgeSettings
from bridge.smtp_settings import SmtpSettings
from docs import node_reference
from gateway import limits
from gateway.settings import GatewaySettings
from runner.settings import RunnerSettings
from scheduler.settings import SchedulerSettings
from workers.deployer.settings import DeployerSettings
from workers.settings import WorkerSettings

ROOT = Path(__file__).parent.parent
PROCESSES: dict[str, type[BaseSettings]] = {
    "gateway": GatewaySettings,
    "worker": WorkerSettings,
    "scheduler": SchedulerSettings,
    "deployer": DeployerSettings,
    "runner": RunnerSettings,
}
BRIDGES: tuple[type[BaseSettings], ...] = (RedisBridgeSettings, SqsBridgeSettings, RabbitmqBridgeSettings)
"""One process, by what it takes messages from."""
WITHOUT_DATABASE: tuple[str, ...] = ("runner", "bridge", "smtp")


def settings_table() -> str:
    """Return a row for those who read the same, with each variable's name, its default, and what it means."""
    readers: dict[str, list[str]] = {}
    fields: dict[str, FieldInfo] = {}
    of_processes: list[tuple[str, type[BaseSettings]]] = [
        *PROCESSES.items(),
        *[("bridge", settings) for settings in BRIDGES],
        ("smtp", SmtpSettings),
    ]
    for process, settings in of_processes:
        for name, field in settings.model_fields.items():
            if process not in readers.setdefault(name, []):
                readers[name].append(process)
            fields.setdefault(name, field)
    groups: dict[str, list[str]] = {}
    for name in sorted(fields, key=lambda name: (-len(readers[name]), list(fields).index(name))):
        groups.setdefault(_readers(readers[name]), []).append(_variable(name, fields[name]))
    rows = [_row(group, "<br>".join(variables)) for group, variables in groups.items()]
    return "\n".join(["| read by | variable, its default, and what it means |", "| --- | --- |", *rows])


def limits_table() -> str:
    """Return a row for each limit, from the constant and the sentence below it."""
    body = ast.parse(inspect.getsource(limits)).body
    rows = []
    for statement, below in pairwise(body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            value = getattr(limits, statement.target.id)
            rows.append(_row(str(below.value.value).rstrip("."), f"{value:,}"))
    return "\n".join(["| limit | value |", "| --- | --- |", *rows])


def with_table(text: str, name: str, table: str) -> str:
    """Return a document with the table between its two marks."""
    before, _, rest = text.partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition(f"<!-- /{name} -->")
    return f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->{after}"


def documents() -> dict[Path, str]:
    """Return each document that is written, or holds a table, from the code, as it should read."""
    readme, operations = ROOT / "README.md", ROOT / "docs/operations.md"
    return {
        readme: with_table(readme.read_text(), "settings", settings_table()),
        operations: with_table(operations.read_text(), "limits", limits_table()),
        ROOT / "docs/nodes.md": node_reference.reference(),
    }


def _row(*cells: str | None) -> str:
    return f"| {' | '.join(cell or '' for cell in cells)} |"


def _readers(processes: list[str]) -> str:
    absent = [process for process in (*PROCESSES, "bridge", "smtp") if process not in processes]
    if not absent:
        return "all"
    return f"all but {', '.join(absent)}" if set(absent) <= set(WITHOUT_DATABASE) else ", ".join(processes)


def _variable(name: str, field: FieldInfo) -> str:
    default = _default(name, field)
    return f"`{name.upper()}`{f' ({default})' if default else ''}: {field.description}"


def _default(name: str, field: FieldInfo) -> str:
    if name == "database_url":
        return "SQLite in `DATA_DIR`"
    if field.default in {None, PydanticUndefined, (), ""}:
        return ""
    return f"`{field.default}`"


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
