from __future__ import annotations

import sys
from typing import Any

import pytest

from telemetry import log_context, run_origin, tracing
from telemetry.trace_export import TracingUnavailable, run_tracer
from telemetry.trace_settings import TraceSettings
from telemetry.tracing import FinishedSpan, TraceContext, Tracer

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("header", "is_sampled"),
    [(f"00-{TRACE}-{SPAN}-01", True), (f"00-{TRACE}-{SPAN}-02", False), (f"cc-{TRACE}-{SPAN}-01-more", True)],
)
def test_a_valid_traceparent_is_read(header: str, is_sampled: bool) -> None:  # noqa: FBT001 - a parameter of a case
    assert tracing.parse_traceparent(header) == TraceContext(TRACE, SPAN, is_sampled)


@pytest.mark.parametrize(
    "header",
    [
        *("", "00", f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-more", f"00-{TRACE}-{SPAN}"),
        *(f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{SPAN}-01"),
        *(f"00-{TRACE[1:]}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01\n", f" 00-{TRACE}-{SPAN}-01"),
    ],
)
def test_a_malformed_traceparent_counts_as_none(header: str) -> None:
    assert tracing.parse_traceparent(header) is None


def test_all_processes_sample_the_same_share_of_traces() -> None:
    one, other = (Tracer(_refuse, sample=0.25) for _ in range(2))
    ids = [tracing.derive_id(16, "run", number) for number in range(4_000)]
    sampled = [trace_id for trace_id in ids if one.samples(trace_id)]
    assert sampled == [trace_id for trace_id in ids if other.samples(trace_id)]
    assert 900 < len(sampled) < 1_100
    assert not any(Tracer(_refuse, sample=0).samples(trace_id) for trace_id in ids)
    assert all(Tracer(_refuse, sample=1).samples(trace_id) for trace_id in ids)


@pytest.mark.parametrize(
    ("url", "is_trusted"),
    [
        ("https://api.example.com/path", True),
        ("https://API.example.com:8443/", True),
        ("http://billing.internal/", True),
        ("https://api.example.com.attacker.test/", False),
        ("https://user:api.example.com@attacker.test/", False),
        ("https://[", False),
    ],
)
def test_requests_carry_a_traceparent_to_trusted_hosts_alone(url: str, is_trusted: bool) -> None:  # noqa: FBT001 - as above
    tracer = Tracer(_refuse, hosts=["api.example.com", "*.internal"])
    now: Any = None
    trace = tracing.RunTrace(tracer, "exec_1", "wf_1", TRACE, SPAN, is_sampled=True, started_at=now)
    token = tracing.current.set(trace)
    try:
        assert bool(tracer.outgoing_headers(url, "call", "", 1)) is is_trusted
    finally:
        tracing.current.reset(token)


async def test_an_address_without_the_extra_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(TracingUnavailable, match=r"pilotflame\[otel\]"):
        async with run_tracer(TraceSettings(otlp_url="http://127.0.0.1:4318"), "test"):
            pass
    async with run_tracer(TraceSettings(), "test"):
        assert tracing.tracer is None


def _refuse(span: FinishedSpan) -> None:
    raise AssertionError(span)


async def test_a_run_keeps_its_request_with_and_without_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    # Asynchronous tests share it, and one before may have left a request.
    log_context.fields.set(log_context.EMPTY)
    assert run_origin.current_origin() is None, "a schedule starts it"
    log_context.fields.set({"request_id": "req_1"})
    untraced = run_origin.current_origin()
    assert run_origin.find_request_id(untraced) == "req_1"
    assert tracing.decode_origin(untraced) == (None, False)
    assert tracing.decode_origin(f"request=00-{TRACE}-{SPAN}-01") == (None, False), "an id is no span"
    assert run_origin.origin_of_child("exec_1", 1, untraced) == untraced

    monkeypatch.setattr(tracing, "tracer", Tracer(_refuse))
    trace = Tracer(_refuse).begin_request([(b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())])
    tracing.mark_awaited()
    origin = run_origin.current_origin()
    assert run_origin.find_request_id(origin) == "req_1"
    assert tracing.decode_origin(origin) == (trace.context, True)

    of_child = run_origin.origin_of_child("exec_1", 3, origin)
    assert run_origin.find_request_id(of_child) == "req_1"
    segment, is_parent = tracing.decode_origin(of_child)
    assert segment is not None
    assert (segment.trace_id, is_parent) == (TRACE, False)


def test_origins_of_runs_of_earlier_versions_are_read() -> None:
    origin = f"parent=00-{TRACE}-{SPAN}-01"
    assert tracing.decode_origin(origin) == (TraceContext(TRACE, SPAN, is_sampled=True), True)
    assert run_origin.find_request_id(origin) is None
