"""PromQL of the table of metrics: a family, label or label value that the table lacks raises LookupError."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from telemetry.metric_families import FAMILIES, MetricFamily, MetricKind

LABELS_OF_PROMETHEUS: Final = frozenset({"job", "instance", "pod", "le"})


def gauge(name: str, **labels: str) -> str:
    """Return the selector of a gauge in PromQL.

    Raises LookupError for unknown metrics, labels and values.
    """
    return _select(_family(name, MetricKind.GAUGE), "", labels)


def rate(name: str, window: str, by: str = "", **labels: str) -> str:
    """Return the PromQL of the rate per second of a counter in a window, summed over processes.

    Raises LookupError for unknown metrics, labels and values.
    """
    family = _family(name, MetricKind.COUNTER)
    return _sum(family, f"rate({_select(family, '', labels)}[{window}])", by)


def event_rate(name: str, window: str, by: str = "", **labels: str) -> str:
    """Return the PromQL of the rate per second of the observations of a histogram, summed over processes.

    Raises LookupError for unknown metrics, labels and values.
    """
    family = _family(name, MetricKind.HISTOGRAM)
    return _sum(family, f"rate({_select(family, '_count', labels)}[{window}])", by)


def rate_within(name: str, bound: float, window: str, **labels: str) -> str:
    """Return the PromQL of the rate per second of the observations of a histogram up to a bound.

    Raises LookupError unless the bound is a bucket of the histogram.
    """
    family = _family(name, MetricKind.HISTOGRAM)
    if bound not in family.buckets:
        raise LookupError(f"{name} has no bucket {bound}")
    return f"sum(rate({_select(family, '_bucket', {**labels, 'le': str(float(bound))})}[{window}]))"


def mean(name: str, window: str, by: str = "", **labels: str) -> str:
    """Return the PromQL of the mean of the observations of a histogram in a window, over all processes.

    Raises LookupError for unknown metrics, labels and values.
    """
    family = _family(name, MetricKind.HISTOGRAM)
    total = _sum(family, f"rate({_select(family, '_sum', labels)}[{window}])", by)
    return f"{total} / {event_rate(name, window, by, **labels)}"


def quantile(share: float, name: str, window: str, by: str = "", **labels: str) -> str:
    """Return the PromQL of a quantile of a histogram in a window, over all processes; `share` is between 0 and 1.

    Raises LookupError for unknown metrics, labels and values.
    """
    family = _family(name, MetricKind.HISTOGRAM)
    _check_labels(family, [by] if by else [])
    groups = f"le, {by}" if by else "le"
    return f"histogram_quantile({share:g}, sum by ({groups}) (rate({_select(family, '_bucket', labels)}[{window}])))"


def _family(name: str, kind: MetricKind) -> MetricFamily:
    """Return the metric family with this name and kind; raises LookupError if the table has none."""
    family = FAMILIES.get(name)
    if family is None or family.kind is not kind:
        raise LookupError(f"The table of metrics has no {kind} {name}")
    return family


def _select(family: MetricFamily, suffix: str, labels: dict[str, str]) -> str:
    """Return a selector in PromQL; values that begin with `~` are regular expressions.

    Raises LookupError for unknown labels and values.
    """
    _check_labels(family, labels)
    matches = []
    for label, value in sorted(labels.items()):
        known = family.labels.get(label, ())
        if known and not value.startswith("~") and value not in known:
            raise LookupError(f"{family.name}: {label} is never {value}")
        matches.append(f'{label}=~"{value[1:]}"' if value.startswith("~") else f'{label}="{value}"')
    selector = f"{{{', '.join(matches)}}}" if matches else ""
    return f"{family.full_name}{suffix}{selector}"


def _sum(family: MetricFamily, expression: str, by: str) -> str:
    """Return the PromQL of the sum of an expression, by the label `by` if it isn't empty;
    raises LookupError for an unknown label.
    """
    _check_labels(family, [by] if by else [])
    return f"sum by ({by}) ({expression})" if by else f"sum({expression})"


def _check_labels(family: MetricFamily, labels: Iterable[str]) -> None:
    unknown = {*labels} - {*family.labels} - LABELS_OF_PROMETHEUS
    if unknown:
        raise LookupError(f"{family.name} has no label {', '.join(sorted(unknown))}")
