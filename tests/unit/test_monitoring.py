"""Alert rules and boards, against the table of metrics and with Prometheus' own checks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from deploy.monitoring import alert_rules, boards, files, queries
from telemetry.metric_families import FAMILIES, MetricKind

NAME: Final = re.compile(r"\bpilotflame_\w+")
SUFFIXES: Final = {
    MetricKind.COUNTER: ("",),
    MetricKind.GAUGE: ("",),
    MetricKind.HISTOGRAM: ("_bucket", "_count", "_sum"),
}
KNOWN: Final = {
    f"{family.full_name}{suffix}" for family in FAMILIES.values() for suffix in SUFFIXES[family.kind]
}
PROMTOOL: Final = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
STEP: Final = "1m"


def all_queries() -> dict[str, str]:
    """Return the PromQL of every rule and panel by its place."""
    of_panels = {
        f"{board.title}, {panel.title}, {legend}": query
        for board in boards.list_boards()
        for panel in board.panels
        for query, legend in panel.queries
    }
    return {rule.name: rule.expression for rule in alert_rules.list_rules()} | of_panels


def test_rules_and_boards_name_metrics_of_the_table_alone() -> None:
    named = {place: set(NAME.findall(query)) for place, query in all_queries().items()}
    assert {place: names - KNOWN for place, names in named.items() if names - KNOWN} == {}
    assert all(named.values()), "each query has a metric"


@pytest.mark.parametrize(
    "build",
    [
        lambda: queries.gauge("no_such_metric"),
        lambda: queries.gauge("claims_total"),
        lambda: queries.rate("claims_total", "5m", workflow="wf_1"),
        lambda: queries.rate("claims_total", "5m", "status"),
        lambda: queries.gauge("pending_oldest_seconds", target="nowhere"),
        lambda: queries.rate_within("wake_seconds", 31, "5m"),
        lambda: queries.quantile(0.5, "commit_seconds", "5m", "node_type"),
    ],
    ids=["family", "kind", "label", "group", "value", "bucket", "group of a histogram"],
)
def test_a_query_that_the_table_cannot_answer_is_refused(build: Any) -> None:  # noqa: ANN401 - a function of a case
    with pytest.raises(LookupError):
        build()


def test_every_rule_names_a_remedy() -> None:
    rules = alert_rules.list_rules()
    assert len({rule.name for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.summary.endswith("."), rule.name
        assert rule.remedy.endswith("."), rule.name


def test_boards_have_panels_that_do_not_overlap() -> None:
    for board in boards.list_boards():
        panels = json.loads(boards.build_board(board))["panels"]
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
        assert len({*places}) == len(panels) > 5
        assert len({panel["id"] for panel in panels}) == len(panels)


@needs_promtool
def test_prometheus_accepts_the_rules_and_the_queries_of_the_boards(tmp_path: Path) -> None:
    recorded = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(all_queries().values())
    ]
    panels = tmp_path / "panels.yaml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    _promtool("check", "rules", str(files.RULES), str(panels))


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    shown = ", ".join(f'{label}="{value}"' for label, value in labels.items())
    return {"series": f"pilotflame_{name}{{{shown}}}", "values": values}


HEALTHY: Final = {
    "runs_held": series("runs_held", "3x150", instance="w"),
    "leader": series("leader", "1x150", instance="s"),
    "build_info": series("build_info", "1x150", version="1"),
    "claims": series("claims_total", "0+600x150"),
    "lost": series("leases_lost_total", "0x150"),
    "requests": series("http_server_request_duration_seconds_count", "0+600x150", status_class="2xx"),
    "failures": series("http_server_request_duration_seconds_count", "0x150", status_class="5xx"),
    "drift": series("drift", "0x150", **{"class": "pending-unclaimed"}),
    "oldest": series("pending_oldest_seconds", "2x150", target="shared"),
    "schedules": series("schedule_lag_seconds", "1x150"),
    "lag": series("event_loop_lag_seconds", "0.01x150", instance="w"),
}
CASES: Final[dict[str, dict[str, dict[str, str] | None]]] = {
    "": {},
    "PilotflameAcceptedRunsNotClaimed": {"drift": series("drift", "2x150", **{"class": "pending-unclaimed"})},
    "PilotflameNoWorker": {"runs_held": None},
    "PilotflameNoLeader": {"leader": series("leader", "0x150", instance="s")},
    "PilotflameTwoLeaders": {"other": series("leader", "1x150", instance="other")},
    "PilotflameVersionsDiffer": {"other": series("build_info", "1x150", version="2")},
    "PilotflameEventLoopBlocked": {"lag": series("event_loop_lag_seconds", "3x150", instance="w")},
    "PilotflameOldestPendingFiveMinutes": {
        "oldest": series("pending_oldest_seconds", "400x150", target="shared")
    },
    "PilotflameSchedulesLate": {"schedules": series("schedule_lag_seconds", "400x150")},
    "PilotflameLeasesLost": {"lost": series("leases_lost_total", "0+60x150")},
    "PilotflameErrorBudgetOfRequests1H": {
        "failures": series("http_server_request_duration_seconds_count", "0+60x150", status_class="5xx")
    },
    "PilotflameAsleepAgainstWindow": {
        "asleep": series("drift", "1x150", **{"class": "asleep-against-window"})
    },
}


@needs_promtool
def test_alerts_fire_for_their_cause_and_none_fires_in_good_health(tmp_path: Path) -> None:
    rules = {rule["alert"]: rule for rule in yaml.safe_load(files.RULES.read_text())["groups"][0]["rules"]}
    tests = []
    for alert, changes in CASES.items():
        given = [one for one in {**HEALTHY, **changes}.values() if one is not None]
        expected = []
        for name, rule in rules.items():
            fires = name == alert
            if fires or not alert:
                labels = {"severity": rule["labels"]["severity"], **_own_labels(name)}
                firing = [{"exp_labels": labels, "exp_annotations": rule["annotations"]}] if fires else []
                expected.append(
                    {
                        "eval_time": "130m" if name.endswith("VersionsDiffer") else "40m",
                        "alertname": name,
                        "exp_alerts": firing,
                    }
                )
        tests.append({"interval": STEP, "input_series": given, "alert_rule_test": expected})
    file = tmp_path / "tests.yaml"
    file.write_text(
        yaml.safe_dump({"rule_files": [str(files.RULES)], "evaluation_interval": "5m", "tests": tests})
    )
    _promtool("test", "rules", str(file))


def _own_labels(name: str) -> dict[str, str]:
    return {"instance": "w"} if name == "PilotflameEventLoopBlocked" else {}


def _promtool(*arguments: str) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
