"""Generator of all pages and tables that come from the code; run by `make docs`."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from deploy.monitoring import files as monitoring_files
from docs import (
    command_reference,
    expression_reference,
    node_reference,
    sdk_reference,
    settings_reference,
    workflow_settings_reference,
)
from doctor.alert_notices import NOTICES
from gateway.http import limits
from gateway.http.refusals import ERROR_CODES
from journal.explanations.blockers import BLOCKER_RULES
from telemetry.metric_families import GROUPS

ROOT = Path(__file__).parent.parent


def build_limits_table() -> str:
    """Return a table with a row for each constant of `models.limits`, with its docstring and value."""
    body = ast.parse(inspect.getsource(limits)).body
    rows = []
    for statement, below in pairwise(body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            value = getattr(limits, statement.target.id)
            rows.append(_format_row(str(below.value.value).rstrip("."), f"{value:,}"))
    return "\n".join(["| limit | value |", "| --- | --- |", *rows])


def build_error_page() -> str:
    """Return the text of the page of error codes, sorted by status and code."""
    rows = [
        _format_row(str(error.status), f"`{code}`", error.meaning)
        for code, error in sorted(ERROR_CODES.items(), key=lambda item: (item[1].status, item[0]))
    ]
    return "\n".join(
        [
            "# Error codes",
            "Responses with a status from 400 on have one of these codes in `error.code`. Programs should use it:",
            "the message is for people and may change. `/docs/api/` lists the codes of each operation. `make docs`",
            "generates this page from the code.",
            "",
            "| status | code | meaning |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def build_blockers_table() -> str:
    """Return a table with a row for each code by which explanations name a reason."""
    rows = [
        _format_row(f"`{code}`", rule.kind, rule.meaning, rule.remedy) for code, rule in BLOCKER_RULES.items()
    ]
    return "\n".join(["| code | kind | meaning | remedy |", "| --- | --- | --- | --- |", *rows])


def build_alerts_table() -> str:
    """Return a table with a row for each alert: its urgency, meaning and remedy."""
    rows = [
        _format_row(f"`Pilotflame{notice.name}`", notice.severity, notice.summary, notice.remedy)
        for notice in NOTICES.values()
    ]
    return "\n".join(["| alert | severity | meaning | remedy |", "| --- | --- | --- | --- |", *rows])


def build_metrics_tables() -> str:
    """Return a table of metric families for each subject, below its heading."""
    parts = []
    for subject, families in GROUPS.items():
        rows = [
            _format_row(
                f"`{family.name}`",
                family.kind,
                "; ".join(
                    f"`{label}`{': ' if values else ''}{', '.join(values)}"
                    for label, values in family.labels.items()
                ),
                family.process,
                family.help,
            )
            for family in families
        ]
        head = ["| name | type | labels | process | meaning |", "| --- | --- | --- | --- | --- |"]
        parts.append("\n".join([f"## {subject}", *head, *rows]))
    return "\n\n".join(parts)


def replace_table(text: str, name: str, table: str) -> str:
    """Return the text of a page with a table in place of the text between its two marks,
    `<!-- name -->` and `<!-- /name -->`.
    """
    before, _, rest = text.partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition(f"<!-- /{name} -->")
    return f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->{after}"


def replace_tables(text: str, tables: Mapping[str, str]) -> str:
    """Return the text of a page with several tables in place, by the names of their marks."""
    for name, table in tables.items():
        text = replace_table(text, name, table)
    return text


def build_documents() -> dict[Path, str]:
    """Return the new text of each generated page, and of each page with a generated table, by path; writes nothing."""
    readme, operations = ROOT / "README.md", ROOT / "docs/operations.md"
    expressions, retries = ROOT / "docs/expressions.md", ROOT / "docs/retries.md"
    workflow_settings = ROOT / "docs/workflow-settings.md"
    why, metrics = ROOT / "docs/why.md", ROOT / "docs/metrics.md"
    command_line = ROOT / "docs/command-line.md"
    return {
        **monitoring_files.build_files(),
        metrics: replace_tables(
            metrics.read_text(), {"alerts": build_alerts_table(), "metrics": build_metrics_tables()}
        ),
        why: replace_table(why.read_text(), "blockers", build_blockers_table()),
        command_line: replace_table(
            command_line.read_text(), "commands", command_reference.build_commands_table()
        ),
        readme: replace_table(readme.read_text(), "settings", settings_reference.build_short_table()),
        operations: replace_table(operations.read_text(), "limits", build_limits_table()),
        ROOT / "docs/errors.md": build_error_page(),
        ROOT / "docs/nodes.md": node_reference.build_reference(),
        expressions: replace_tables(expressions.read_text(), expression_reference.build_parts()),
        ROOT / "docs/sdk-reference.md": sdk_reference.build_page(),
        ROOT / "docs/settings.md": settings_reference.build_page(),
        workflow_settings: replace_table(
            workflow_settings.read_text(),
            "workflow-settings",
            workflow_settings_reference.build_settings_table(),
        ),
        retries: replace_tables(
            retries.read_text(),
            {
                "retry": workflow_settings_reference.build_retry_table(),
                "delays": workflow_settings_reference.build_delays_table(),
            },
        ),
    }


def _format_row(*cells: str | None) -> str:
    return f"| {' | '.join(cell or '' for cell in cells)} |"


if __name__ == "__main__":
    for path, text in build_documents().items():
        path.write_text(text)
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
