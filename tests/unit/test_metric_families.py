"""Table of metric families: names with units, and labels from closed sets."""

from __future__ import annotations

import pytest
from prometheus_client import Counter

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


def test_a_label_value_outside_of_the_table_counts_as_other() -> None:
    instruments.counter("executions_accepted_total", "a kind of somebody's own").inc()
    exposed = instruments.counter("executions_accepted_total", "a kind of somebody's own")
    assert isinstance(exposed, Counter)
    assert exposed._labelvalues == ("other",)  # noqa: SLF001 - the library shows them nowhere else


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
