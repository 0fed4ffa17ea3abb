"""Instruments of the table's families: created at their first use, so that a process exposes only its own."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Final, TypeVar

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from telemetry.metric_families import FAMILIES, MetricFamily, MetricKind

Metric = TypeVar("Metric", Counter, Gauge, Histogram)

MAX_CHILDREN: Final = 5_000
"""Label combinations of one family; further ones are counted together as `other`."""
OTHER: Final = "other"
_children: dict[str, int] = {}
disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody reads


class UnreadInstrument:
    """Instrument of a process whose metrics nobody can read: it counts nothing, and costs next to nothing."""

    def inc(self, amount: float = 1) -> None:
        """Do nothing."""

    def dec(self, amount: float = 1) -> None:
        """Do nothing."""

    def set(self, value: float) -> None:
        """Do nothing."""

    def observe(self, amount: float) -> None:
        """Do nothing."""


_UNREAD: Final = UnreadInstrument()
is_exposed = False
"""Whether the metrics of this process are served; code that computes values for them may ask first."""


def expose() -> None:
    """Count from now on, because the metrics of this process are served."""
    global is_exposed  # noqa: PLW0603 - of the process
    is_exposed = True
    for lookup in (counter, gauge, histogram):
        lookup.cache_clear()


@cache
def counter(name: str, *values: str) -> Counter | UnreadInstrument:
    """Return the counter of a family with these label values, in the order of its labels.

    Values that the family does not list, and combinations beyond `MAX_CHILDREN`, share the counter `other`.
    While the process exposes no metrics, nothing is counted; otherwise raises LookupError for an unknown
    family or one of another kind.
    """
    return _counter_child(name, *values) if is_exposed else _UNREAD


@cache
def gauge(name: str, *values: str) -> Gauge | UnreadInstrument:
    """Return the gauge of a family with these label values, in the order of its labels.

    Values that the family does not list, and combinations beyond `MAX_CHILDREN`, share the gauge `other`.
    While the process exposes no metrics, nothing is shown; otherwise raises LookupError for an unknown family
    or one of another kind.
    """
    return _gauge_child(name, *values) if is_exposed else _UNREAD


@cache
def histogram(name: str, *values: str) -> Histogram | UnreadInstrument:
    """Return the histogram of a family with these label values, in the order of its labels.

    Values that the family does not list, and combinations beyond `MAX_CHILDREN`, share the histogram `other`.
    While the process exposes no metrics, nothing is observed; otherwise raises LookupError for an unknown
    family or one of another kind.
    """
    return _histogram_child(name, *values) if is_exposed else _UNREAD


def declare(*names: str) -> None:
    """Expose families from the start, with every combination of labels that the table lists.

    A family with a label of free values is declared without any.
    """
    of_kind = {
        MetricKind.COUNTER: _counter_child,
        MetricKind.GAUGE: _gauge_child,
        MetricKind.HISTOGRAM: _histogram_child,
    }
    for name in names:
        family = FAMILIES[name]
        make = of_kind[family.kind]
        if all(family.labels.values()):
            for values in product(*family.labels.values()):
                make(name, *values)
        else:
            _of_family(family)


@cache
def _counter_child(name: str, *values: str) -> Counter:
    return _bound_child(_create_counter(name), name, values)


@cache
def _gauge_child(name: str, *values: str) -> Gauge:
    return _bound_child(_create_gauge(name), name, values)


@cache
def _histogram_child(name: str, *values: str) -> Histogram:
    return _bound_child(_create_histogram(name), name, values)


def _bound_child(metric: Metric, name: str, values: tuple[str, ...]) -> Metric:
    labels = FAMILIES[name].labels
    if not labels:
        return metric
    _children[name] = _children.get(name, 0) + 1
    if _children[name] > MAX_CHILDREN:
        return metric.labels(*[OTHER] * len(labels))
    allowed = zip(values, labels.values(), strict=True)
    return metric.labels(*[value if not known or value in known else OTHER for value, known in allowed])


def _of_family(family: MetricFamily) -> Counter | Gauge | Histogram:
    match family.kind:
        case MetricKind.COUNTER:
            return _create_counter(family.name)
        case MetricKind.GAUGE:
            return _create_gauge(family.name)
        case MetricKind.HISTOGRAM:
            return _create_histogram(family.name)


@cache
def _create_counter(name: str) -> Counter:
    family = _find_family(name, MetricKind.COUNTER)
    return Counter(family.full_name, family.help, list(family.labels))


@cache
def _create_gauge(name: str) -> Gauge:
    family = _find_family(name, MetricKind.GAUGE)
    return Gauge(family.full_name, family.help, list(family.labels))


@cache
def _create_histogram(name: str) -> Histogram:
    family = _find_family(name, MetricKind.HISTOGRAM)
    return Histogram(family.full_name, family.help, list(family.labels), buckets=family.buckets)


def _find_family(name: str, kind: MetricKind) -> MetricFamily:
    family = FAMILIES[name]
    if family.kind is not kind:
        raise LookupError(f"{name} is a {family.kind}, not a {kind}")
    return family
