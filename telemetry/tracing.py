"""Traces of requests and runs, with ids that are derived from the run, so that a repeated export doubles nothing.

`tracer` is None unless the operator has set `PILOTFLAME_OTLP_URL`. Callers look at it before they call anything here,
so that a process without traces neither loads OpenTelemetry nor enters this file.

A run has no span that stays open: each claim of it is a segment, which ends with the claim, and each attempt of a node
is a span that is sent when its record is committed. Spans carry ids, types and codes; never values, messages or URLs.
"""

from __future__ import annotations

import fnmatch
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Final, Literal, TypeAlias
from urllib.parse import urlsplit

from msgspec import Struct, field

Attributes: TypeAlias = Mapping[str, str | int | tuple[str, ...]]
SpanKind: TypeAlias = Literal["internal", "server", "producer", "consumer", "client"]

HEADER: Final = "traceparent"
TRACE_BYTES: Final = 16
SPAN_BYTES: Final = 8
UNTRACED_ROUTES: Final = ("/health", "/docs", "none")
"""Beginnings of the templates of routes without spans: probes, static files, and paths that no route has."""
FIRST_SERVER_ERROR: Final = 500
SAMPLE_STEPS: Final = 1 << 56
"""Number of values of the random part of a trace id that decides whether it is sampled."""
_CODE: Final = re.compile(r"[a-z][a-z0-9-]{0,63}")
_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceContext(Struct, frozen=True):
    """Identity of a span in its trace, as in the header `traceparent` (https://www.w3.org/TR/trace-context/)."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    is_sampled: bool

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.is_sampled else '00'}"


class FinishedSpan(Struct, frozen=True):
    """Span as it is sent, after its end."""

    name: str
    kind: SpanKind
    context: TraceContext
    parent: TraceContext | None
    started_at: datetime
    ended_at: datetime
    attributes: Attributes
    links: Sequence[TraceContext] = ()
    error: str | None = None
    """Code of the error that ended it."""


def parse_traceparent(text: str) -> TraceContext | None:
    """Return the context of a `traceparent` header (W3C Trace Context); None if it is malformed.

    Ids of zeros only and version `ff` are malformed.
    """
    match = _TRACEPARENT.fullmatch(text)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return TraceContext(trace_id, span_id, is_sampled=bool(int(flags, 16) & 1))


def limit_code(code: str) -> str:
    """Return an error code for a trace: the code itself if it is up to 64 small letters, digits and hyphens that begin
    with a letter, else `error`, since it may be data.
    """
    return code if _CODE.fullmatch(code) else "error"


def derive_id(size: int, *parts: str | int) -> str:
    """Return an id of `size` bytes as `2 * size` hexadecimal digits, always the same for the same parts."""
    return blake2b("\0".join(map(str, parts)).encode(), digest_size=size).hexdigest()


_ORIGIN_KINDS: Final = frozenset({"parent", "link"})


def encode_origin(context: TraceContext, *, is_awaited: bool) -> str:
    """Return the text that a run's row stores about the span that started it.

    `parent=` or `link=` and the context: a parent if the answer to the request waits for the run, else a
    link.
    """
    return f"{'parent' if is_awaited else 'link'}={context}"


def decode_origin(origin: str | None) -> tuple[TraceContext | None, bool]:
    """Return the span that started a run, None without a valid one, and whether it is the run's parent.

    `origin` is the stored text of `encode_origin`, with other fields behind it or instead of it, or None.
    """
    kind, _, text = (origin or "").partition(" ")[0].partition("=")
    # The id of a request is the choice of its client, and may look like a span.
    caller = parse_traceparent(text) if kind in _ORIGIN_KINDS else None
    return caller, caller is not None and kind == "parent"


def find_trace_page(template: str, execution_id: str, origin: str | None) -> str | None:
    """Return the address of the page of a run's trace, from a template with `{trace_id}`.

    None without a template, in a process without traces, and for a run that is not sampled.
    """
    if not template or tracer is None:
        return None
    caller, is_child = decode_origin(origin)
    trace_id, is_sampled = tracer.trace_of(execution_id, caller, is_child=is_child)
    return template.replace("{trace_id}", trace_id) if is_sampled else None


class RequestTrace(Struct):
    """Trace of one request to the gateway."""

    tracer: Tracer
    trace_id: str
    span_id: str
    parent: TraceContext | None
    has_key: bool = False
    """Whether a key authenticates the request: only then the caller decides whether it is sampled."""
    is_awaited: bool = False
    """Whether the answer waits for the run that the request starts, which then belongs to this trace."""

    @property
    def context(self) -> TraceContext:
        """Trace context of the request's span.

        The caller's decision whether the trace is sampled counts only if the request has a valid key; else the
        configured share decides.
        """
        if self.has_key and self.parent is not None:
            return TraceContext(self.trace_id, self.span_id, self.parent.is_sampled)
        return TraceContext(self.trace_id, self.span_id, self.tracer.samples(self.trace_id))

    def origin(self) -> str:
        """Return the text that the row of a run stores about the request that starts it."""
        return encode_origin(self.context, is_awaited=self.is_awaited)

    def end(
        self, now: datetime, seconds: float, method: str, route: str, status: int, request_id: str
    ) -> None:
        """Send the span of the request, which ended at `now` after `seconds`; nothing if it isn't sampled.

        A status from 500 on is an error. Routes of probes and static files, and unknown paths, have no span.
        """
        if not self.context.is_sampled or route.startswith(UNTRACED_ROUTES):
            return
        attributes: dict[str, str | int] = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "pilotflame.request.id": request_id,
        }
        started_at = now - timedelta(seconds=seconds)
        error = str(status) if status >= FIRST_SERVER_ERROR else None
        name = f"{method} {route}"
        self.tracer.send(
            FinishedSpan(name, "server", self.context, self.parent, started_at, now, attributes, (), error)
        )


class RunTrace(Struct):
    """Trace of one claim of a run, a segment."""

    tracer: Tracer
    execution_id: str
    workflow_id: str
    trace_id: str
    segment_id: str
    is_sampled: bool
    started_at: datetime
    """Time of the claim."""
    _contents: dict[object, object] = field(default_factory=dict)
    """Contents of calls of language models until their spans are sent, by the identities of the calls."""

    @property
    def carries_content(self) -> bool:
        """Whether the spans of language models carry prompts and answers."""
        return self.is_sampled and self.tracer.sends_content

    def hold_content(self, call: object, content: object) -> None:
        """Keep the content of a call of a model for its span, which is sent later;
        do nothing unless spans carry content.

        `call` is any hashable value that identifies the call within the run.
        """
        if self.carries_content:
            self._contents[call] = content

    def take_content(self, call: object) -> object | None:
        """Return and forget the content that `hold_content` kept for a call; None if there is none."""
        return self._contents.pop(call, None)

    @property
    def context(self) -> TraceContext:
        """Trace context of the segment (one claim of the run by a worker)."""
        return TraceContext(self.trace_id, self.segment_id, self.is_sampled)

    def origin(self) -> str:
        """Return the text that the row of a sub-workflow's run stores about this run, which starts it."""
        return encode_origin(self.context, is_awaited=False)

    def node_context(self, node_id: str, iteration: str, attempt: int) -> TraceContext:
        """Return the trace context of one attempt of a node."""
        span_id = _node_span_id(self.execution_id, node_id, iteration, attempt)
        return TraceContext(self.trace_id, span_id, self.is_sampled)

    def node_attributes(
        self, node_id: str, node_type: str, iteration: str, attempt: int, status: str
    ) -> dict[str, str | int | tuple[str, ...]]:
        """Return the attributes of the span of one attempt of a node; `iteration` is empty outside of loops."""
        attributes: dict[str, str | int | tuple[str, ...]] = {
            "pilotflame.execution.id": self.execution_id,
            "pilotflame.node.id": node_id,
            "pilotflame.node.type": node_type,
            "pilotflame.node.attempt": attempt,
            "pilotflame.node.status": status,
        }
        if iteration:
            attributes["pilotflame.node.iteration"] = iteration
        return attributes

    def part_context(self, *parts: str | int) -> TraceContext:
        """Return the trace context of a part of a node's work, such as a call; `parts` identify it within the run."""
        return TraceContext(
            self.trace_id, derive_id(SPAN_BYTES, "part", self.execution_id, *parts), self.is_sampled
        )

    def add_span(
        self,
        name: str,
        kind: SpanKind,
        context: TraceContext,
        parent: TraceContext,
        started_at: datetime,
        ended_at: datetime,
        attributes: Attributes,
        error: str | None,
    ) -> None:
        """Send a span of this claim; time before the claim, such as a wait, is cut off. `error` is None for success."""
        since = max(started_at, min(self.started_at, ended_at))
        self.tracer.send(
            FinishedSpan(*(name, kind, context, parent, since, max(since, ended_at), attributes, (), error))
        )

    def end(self, now: datetime, status: str, error: str | None) -> None:
        """Send the span of the segment (one claim of the run), which ends at `now`, if its trace is sampled.

        `status` is the status of the run then; `error` is None without an error.
        """
        if not self.is_sampled:
            return
        attributes = {
            **self.tracer.run_attributes(self.execution_id, self.workflow_id),
            "messaging.operation.type": "process",
            "pilotflame.run.status": status,
        }
        parent = TraceContext(self.trace_id, _start_id(self.execution_id), is_sampled=True)
        self.tracer.send(
            FinishedSpan(
                "run segment", "consumer", self.context, parent, self.started_at, now, attributes, (), error
            )
        )


current: Final[ContextVar[RequestTrace | RunTrace | None]] = ContextVar("current_trace", default=None)
"""Trace of the request or run that the current task works for."""


def current_origin() -> str | None:
    """Return the text that the row of a new run stores about the current request or run, which starts it.

    None outside of a trace.
    """
    trace = current.get()
    return None if trace is None else trace.origin()


def mark_awaited() -> None:
    """Record that the answer to the current request waits for the run that it starts.

    The span of the request becomes the parent of the run's spans, not only a link. Does nothing outside of a request.
    """
    trace = current.get()
    if isinstance(trace, RequestTrace):
        trace.is_awaited = True


class Tracer:
    """Begins the traces of one process and sends their spans."""

    def __init__(
        self,
        send: Callable[[FinishedSpan], None],
        *,
        sample: float = 1.0,
        hosts: Iterable[str] = (),
        sends_content: bool = False,
    ) -> None:
        """Send finished spans by a function that never blocks; `sample` is the share of traces without a caller's
        decision. Requests of nodes to `hosts`, patterns such as `*.example.com`, carry a `traceparent`.

        `sends_content` lets the spans of language models carry prompts and answers.
        """
        self.send = send
        self.sends_content = sends_content
        self._limit = int(sample * SAMPLE_STEPS)
        self._hosts = tuple(host.lower() for host in hosts)

    def samples(self, trace_id: str) -> bool:
        """Return whether a trace without a decision of its caller is sampled, by the configured share.

        Every process decides the same for the same trace id.
        """
        return int(trace_id[-14:], 16) < self._limit

    def begin_request(self, headers: Iterable[tuple[bytes, bytes]]) -> RequestTrace:
        """Begin the trace of a request and make it current; return it.

        It continues the caller's trace if there is exactly one valid `traceparent`.
        """
        given = [value for name, value in headers if name == b"traceparent"]
        parent = parse_traceparent(given[0].decode("latin-1")) if len(given) == 1 else None
        trace_id = secrets.token_hex(TRACE_BYTES) if parent is None else parent.trace_id
        trace = RequestTrace(self, trace_id, secrets.token_hex(SPAN_BYTES), parent)
        current.set(trace)
        return trace

    def begin_segment(
        self,
        execution_id: str,
        workflow_id: str,
        origin: str | None,
        *,
        token: int,
        accepted_at: datetime | None,
        started_at: datetime,
        claimed_at: datetime,
    ) -> RunTrace:
        """Begin the trace segment of a run that a worker has claimed, make it current, and return it.

        `origin` is the stored text about the request that started the run, None without one; `token` is the fencing
        token of the claim at `claimed_at`, and `started_at` the time of the run's first claim. `accepted_at` is given
        only at the first claim: then the span from acceptance to `started_at` is sent, the parent of all segments of
        the run.
        """
        caller, is_child = decode_origin(origin)
        trace_id, is_sampled = self.trace_of(execution_id, caller, is_child=is_child)
        segment_id = _segment_id(execution_id, token)
        trace = RunTrace(self, execution_id, workflow_id, trace_id, segment_id, is_sampled, claimed_at)
        current.set(trace)
        if is_sampled and accepted_at is not None:
            start = TraceContext(trace_id, _start_id(execution_id), is_sampled=True)
            links = () if caller is None or is_child else (caller,)
            attributes = self.run_attributes(execution_id, workflow_id)
            parent = caller if is_child else None
            self.send(
                FinishedSpan(
                    *("run accepted", "producer", start, parent, min(accepted_at, started_at), started_at),
                    attributes,
                    links,
                )
            )
        return trace

    def trace_of(self, execution_id: str, caller: TraceContext | None, *, is_child: bool) -> tuple[str, bool]:
        """Return the id of a run's trace, and whether it is sampled.

        `caller` is the span that started the run, None without one. Its trace is the run's if `is_child`,
        else the run has a trace of its own; the caller's decision about sampling counts in both cases.
        """
        own_id = derive_id(TRACE_BYTES, "run", execution_id)
        if caller is None:
            return own_id, self.samples(own_id)
        return caller.trace_id if is_child else own_id, caller.is_sampled

    def node_context(
        self, execution_id: str, origin: str | None, node_id: str, iteration: str, attempt: int
    ) -> TraceContext:
        """Return the trace context of one attempt of a node, in a process that does not hold its run."""
        caller, is_child = decode_origin(origin)
        trace_id, is_sampled = self.trace_of(execution_id, caller, is_child=is_child)
        return TraceContext(trace_id, _node_span_id(execution_id, node_id, iteration, attempt), is_sampled)

    def segment_context(self, execution_id: str, origin: str | None, token: int) -> TraceContext:
        """Return the trace context of one claim of a run, by its fencing token,
        also in a process that does not hold the run.
        """
        caller, is_child = decode_origin(origin)
        trace_id, is_sampled = self.trace_of(execution_id, caller, is_child=is_child)
        return TraceContext(trace_id, _segment_id(execution_id, token), is_sampled)

    def run_attributes(self, execution_id: str, workflow_id: str) -> dict[str, str | int]:
        """Return the attributes that all spans of a run share: its id, its workflow's id, and those of messaging."""
        return {
            "messaging.system": "pilotflame",
            "messaging.message.id": execution_id,
            "pilotflame.execution.id": execution_id,
            "pilotflame.workflow.id": workflow_id,
        }

    def outgoing_headers(self, url: str, node_id: str, iteration: str, attempt: int) -> dict[str, str]:
        """Return the `traceparent` header that a node adds to its request; empty outside of a traced run.

        Empty too unless the operator trusts the URL's host.
        """
        trace = current.get()
        if not isinstance(trace, RunTrace) or not self._is_trusted(url):
            return {}
        return {HEADER: str(trace.node_context(node_id, iteration, attempt))}

    def _is_trusted(self, url: str) -> bool:
        """Return whether the host of a URL is one that the operator trusts with trace headers."""
        try:
            host = (urlsplit(url).hostname or "").lower()
        except ValueError:
            return False
        return any(fnmatch.fnmatchcase(host, pattern) for pattern in self._hosts)


def _node_span_id(execution_id: str, node_id: str, iteration: str, attempt: int) -> str:
    return derive_id(SPAN_BYTES, "node", execution_id, node_id, iteration, attempt)


def _segment_id(execution_id: str, token: int) -> str:
    """Return the id of the span of one claim of a run."""
    return derive_id(SPAN_BYTES, "segment", execution_id, token)


def _start_id(execution_id: str) -> str:
    """Return the id of the span between a run's acceptance and its first claim."""
    return derive_id(SPAN_BYTES, "accepted", execution_id)


tracer: Tracer | None = None
"""Tracer of this process; None: no traces."""
