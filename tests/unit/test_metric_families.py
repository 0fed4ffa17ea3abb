"""Table of metric families: names with units, and labels from closed sets."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY, Histogram, exposition
from prometheus_client.core import CollectorRegistry

from execution.run_metrics import WorkflowLabels
from telemetry import instruments
from telemetry.metric_families import BY_WORKFLOW, FAMILIES, GROUPS, MetricKind


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_a_name_a_unit_and_closed_labels(name: str) -> None:
    family = FAMILIES[name]
    assert family.help.endswith(".")
    assert name.endswith("_total") == (family.kind is MetricKind.COUNTER)
    if family.kind is MetricKind.HISTOGRAM:
        assert name.endswith(("_seconds", "_size"))
    assert not {*family.labels} & {"execution", "execution_id", "user", "organization"}
    assert ("workflow" in family.labels) == (family in GROUPS[BY_WORKFLOW])


def test_workflows_beyond_the_limit_count_together() -> None:
    labels = WorkflowLabels()
    assert labels.label("wf_1") is None
    labels.allow(2)
    assert [labels.label(f"wf_{number}") for number in (1, 2, 3, 1)] == ["wf_1", "wf_2", "other", "wf_1"]


def exposed(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"pilotflame_{name}", labels)


def test_a_label_value_outside_of_the_table_counts_as_other() -> None:
    before = exposed("executions_accepted_total", trigger="other") or 0
    instruments.counter("executions_accepted_total", "a kind of somebody's own").inc()
    assert exposed("executions_accepted_total", trigger="other") == before + 1


def test_combinations_of_labels_beyond_the_limit_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {values for values, _ in instruments.list_values("intake_refusals_total")}
    monkeypatch.setattr(instruments, "MAX_CHILDREN", len(known) + 1)
    for number in range(3):
        instruments.counter("intake_refusals_total", "/route", f"reason-{number}").inc()
    added = {values for values, _ in instruments.list_values("intake_refusals_total")} - known
    assert added - {("other", "other")} == {("/route", "reason-0")}
    assert (exposed("intake_refusals_total", route="other", reason="other") or 0) >= 2


def test_a_histogram_is_exposed_as_that_of_the_client() -> None:
    amounts = (0, 0.001, 0.0011, 0.25, 30, 31, 1e9)
    registry = CollectorRegistry()
    family = FAMILIES["tick_seconds"]
    reference = Histogram(family.full_name, family.help, ["duty"], buckets=family.buckets, registry=registry)
    for amount in amounts:
        instruments.histogram("tick_seconds", "a duty").observe(amount)
        reference.labels("a duty").observe(amount)
    lines = {
        line
        for line in exposition.generate_latest(registry).decode().splitlines()
        if "_created" not in line and line not in exposition.generate_latest(REGISTRY).decode().splitlines()
    }
    assert lines == set()


def test_gauges_are_set_and_counters_grow() -> None:
    gauge = instruments.gauge("wake_waiters")
    gauge.set(5)
    gauge.inc()
    gauge.dec(2)
    assert exposed("wake_waiters") == 4


def test_an_instrument_has_the_kind_of_its_family() -> None:
    with pytest.raises(LookupError, match="is a counter"):
        instruments.gauge("claims_total")


def test_a_process_without_served_metrics_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = instruments.counter("claims_total")
    monkeypatch.setattr(instruments, "is_exposed", False)
    lookups = instruments.counter, instruments.gauge, instruments.histogram
    try:
        for lookup, name in zip(lookups, ("claims_total", "runs_held", "commit_seconds"), strict=True):
            lookup.cache_clear()
            unread = lookup(name)
            assert isinstance(unread, instruments.UnreadInstrument)
            unread.inc(5)
            unread.set(5)
            unread.observe(5)
    finally:
        instruments.expose()
    assert instruments.counter("claims_total") is before
