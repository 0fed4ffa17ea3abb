"""Instruments of the table's families: created at their first use, so that a process exposes only its own.

They are plain numbers without locks, because a run passes some twelve of them: the thread of the event loop changes
them, and the thread that serves scrapes (`telemetry.exposition`) only reads them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product
from typing import Final, TypeVar

from telemetry.metric_families import FAMILIES, MetricFamily, MetricKind

Labels = tuple[str, ...]
Instrument = TypeVar("Instrument", "Counter", "Gauge", "Histogram")

MAX_CHILDREN: Final = 5_000
"""Label combinations of one family; further ones are counted together as `other`."""
OTHER: Final = "other"


class Counter:
    """Number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Add an amount, 1 by default, to the value."""
        self.value += amount


class Gauge:
    """Number that is set, or grows and shrinks."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Add an amount, 1 by default, to the value."""
        self.value += amount

    def dec(self, amount: float = 1) -> None:
        """Subtract an amount, 1 by default, from the value."""
        self.value -= amount

    def set(self, value: float) -> None:
        """Replace the value by another one."""
        self.value = value


class Histogram:
    """Numbers of observations by bucket, and the sum of the observed amounts."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Observations of each bucket alone; the last one is for amounts above all bounds."""
        self.total = 0.0

    def observe(self, amount: float) -> None:
        """Count an amount in its bucket (the first whose bound is at least the amount), and add it to the total."""
        self.counts[bisect_left(self.bounds, amount)] += 1
        self.total += amount


class UnreadInstrument:
    """Instrument of a process that exposes no metrics: it counts nothing, and costs next to nothing."""

    def inc(self, amount: float = 1) -> None:
        """Do nothing."""

    def dec(self, amount: float = 1) -> None:
        """Do nothing."""

    def set(self, value: float) -> None:
        """Do nothing."""

    def observe(self, amount: float) -> None:
        """Do nothing."""


_UNREAD: Final = UnreadInstrument()
_declared: Final[dict[str, MetricFamily]] = {}
_counters: Final[dict[str, dict[Labels, Counter]]] = {}
_gauges: Final[dict[str, dict[Labels, Gauge]]] = {}
_histograms: Final[dict[str, dict[Labels, Histogram]]] = {}
is_exposed = False
"""Whether the metrics of this process are served; code that computes values for them may ask first."""


def expose() -> None:
    """Make all instruments of this process count from now on; called when its metrics are served.

    Instruments that were looked up before still count nothing: look them up again.
    """
    global is_exposed  # noqa: PLW0603 - of the process
    is_exposed = True
    for lookup in (counter, gauge, histogram):
        lookup.cache_clear()


@cache
def counter(name: str, *values: str) -> Counter | UnreadInstrument:
    """Return the counter of a metric family with these label values, in the order of its labels.

    Values that the family does not list, and combinations beyond 5,000 per family, share the counter `other`. While the
    process exposes no metrics, an instrument that counts nothing is returned; otherwise raises `LookupError` for an
    unknown family or one of another kind, and `ValueError` for another number of values.
    """
    return _find_counter(name, values) if is_exposed else _UNREAD


@cache
def gauge(name: str, *values: str) -> Gauge | UnreadInstrument:
    """Return the gauge of a metric family with these label values, in the order of its labels.

    Values that the family does not list, and combinations beyond 5,000 per family, share the gauge `other`. While the
    process exposes no metrics, an instrument that shows nothing is returned; otherwise raises `LookupError` for an
    unknown family or one of another kind, and `ValueError` for another number of values.
    """
    return _find_gauge(name, values) if is_exposed else _UNREAD


@cache
def histogram(name: str, *values: str) -> Histogram | UnreadInstrument:
    """Return the histogram of a metric family with these label values, in the order of its labels.

    Values that the family does not list, and combinations beyond 5,000 per family, share the histogram `other`. While
    the process exposes no metrics, an instrument that observes nothing is returned; otherwise raises `LookupError` for
    an unknown family or one of another kind, and `ValueError` for another number of values.
    """
    return _find_histogram(name, values) if is_exposed else _UNREAD


def declare(*names: str) -> None:
    """Show metric families at 0 from the beginning if this process exposes metrics, with every combination of the label
    values that the table lists.

    A family with a label of free values is exposed without values until its first use. Raises `KeyError` for an unknown
    family.
    """
    of_kind: Mapping[MetricKind, Callable[[str, Labels], object]] = {
        MetricKind.COUNTER: _find_counter,
        MetricKind.GAUGE: _find_gauge,
        MetricKind.HISTOGRAM: _find_histogram,
    }
    for name in names:
        family = FAMILIES[name]
        _declared[name] = family
        if all(family.labels.values()):
            for values in product(*family.labels.values()):
                of_kind[family.kind](name, values)


def list_families() -> list[MetricFamily]:
    """Return the metric families that this process exposes, in the order of their declaration or first use."""
    return [*_declared.values()]


def list_values(name: str) -> list[tuple[Labels, Counter | Gauge | Histogram]]:
    """Return the label values and the instrument of each combination of a family; empty before the first use.

    Unknown families are empty too.
    """
    tables = _counters.get(name) or _gauges.get(name) or _histograms.get(name) or {}
    return [*tables.items()]


def _find_counter(name: str, values: Labels) -> Counter:
    family = _find_family(name, MetricKind.COUNTER)
    return _find_child(_counters.setdefault(name, {}), family, values, Counter)


def _find_gauge(name: str, values: Labels) -> Gauge:
    family = _find_family(name, MetricKind.GAUGE)
    return _find_child(_gauges.setdefault(name, {}), family, values, Gauge)


def _find_histogram(name: str, values: Labels) -> Histogram:
    family = _find_family(name, MetricKind.HISTOGRAM)
    bounds = tuple(family.buckets)
    return _find_child(_histograms.setdefault(name, {}), family, values, lambda: Histogram(bounds))


def _find_family(name: str, kind: MetricKind) -> MetricFamily:
    """Return a family of this kind and note that this process exposes it.

    Raises `KeyError` for an unknown family, and `LookupError` for one of another kind.
    """
    family = FAMILIES[name]
    if family.kind is not kind:
        raise LookupError(f"{name} is a {family.kind}, not a {kind}")
    _declared.setdefault(name, family)
    return family


def _find_child(
    children: dict[Labels, Instrument], family: MetricFamily, values: Labels, make: Callable[[], Instrument]
) -> Instrument:
    """Return the instrument of these label values, created at its first use.

    Values that the family does not list become `other`; beyond 5,000 combinations, so do all values of a new one.
    """
    allowed = zip(values, family.labels.values(), strict=True)
    labels = tuple(value if not known or value in known else OTHER for value, known in allowed)
    if labels not in children and len(children) >= MAX_CHILDREN:
        labels = (OTHER,) * len(family.labels)
    found = children.get(labels)
    if found is None:
        found = children[labels] = make()
    return found
