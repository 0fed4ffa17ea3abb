"""Exposition of the instruments by the Prometheus client, which adds metrics of the process and of Python."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from telemetry import instruments
from telemetry.instruments import Histogram
from telemetry.metric_families import FAMILIES, MetricFamily, MetricKind

if TYPE_CHECKING:
    from prometheus_client import Metric


class InstrumentCollector(Collector):
    """Reader of all instruments of this process, for each scrape."""

    def collect(self) -> Iterator[Metric]:
        """Yield the families of this process with their present values."""
        for family in instruments.list_families():
            yield _collect_family(family)

    def describe(self) -> Iterator[Metric]:
        """Yield all families of the table, so that the registry knows their names before their first use."""
        for family in FAMILIES.values():
            yield _collect_family(family)


def _collect_family(family: MetricFamily) -> Metric:
    """Return a family with its present values as the Prometheus client expects it; a family that the process has not
    used yet has none.
    """
    labels = list(family.labels)
    if family.kind is MetricKind.HISTOGRAM:
        shown = HistogramMetricFamily(family.full_name, family.help, labels=labels)
        for values, found in instruments.list_values(family.name):
            if isinstance(found, Histogram):
                shown.add_metric(values, _cumulate(found), found.total)
        return shown
    kind = CounterMetricFamily if family.kind is MetricKind.COUNTER else GaugeMetricFamily
    numbers = kind(family.full_name, family.help, labels=labels)
    for values, found in instruments.list_values(family.name):
        if not isinstance(found, Histogram):
            numbers.add_metric(values, found.value)
    return numbers


def _cumulate(found: Histogram) -> list[tuple[str, float]]:
    """Return each upper bound of a histogram as text, with the number of observations up to it;
    the last bound is `+Inf`.
    """
    bounds = [*map(floatToGoString, found.bounds), "+Inf"]
    return [*zip(bounds, map(float, accumulate([*found.counts])), strict=True)]


@cache
def register() -> None:
    """Register the instruments of this process in the Prometheus client's default registry;
    later calls change nothing.
    """
    REGISTRY.register(InstrumentCollector())
