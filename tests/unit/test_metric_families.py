"""Table of metric families: names with units, and labels from closed sets."""

from __future__ import annotations

import pytest

from telemetry import instruments
from telemetry.metric_families import FAMILIES, MetricKind


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_a_name_a_unit_and_closed_labels(name: str) -> None:
    family = FAMILIES[name]
    assert family.help.endswith(".")
    assert name.endswith("_total") == (family.kind is MetricKind.COUNTER)
    if family.kind is MetricKind.HISTOGRAM:
        assert name.endswith(("_seconds", "_size"))
    assert not {*family.labels} & {"execution", "execution_id", "workflow", "user", "organization"}


def test_a_label_value_outside_of_the_table_counts_as_other() -> None:
    instruments.counter("executions_accepted_total", "a kind of somebody's own").inc()
    exposed = instruments.counter("executions_accepted_total", "a kind of somebody's own")
    assert exposed._labelvalues == ("other",)  # noqa: SLF001 - the library shows them nowhere else


def test_an_instrument_has_the_kind_of_its_family() -> None:
    with pytest.raises(LookupError, match="is a counter"):
        instruments.gauge("claims_total")
