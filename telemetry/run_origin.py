"""Request that started a run, and its span, as the column `trace_origin` of the run's row has them.

The text is `link=<traceparent> request=<request id>`, with `parent` for a request that waits for the run. Without
traces the first field is missing, and without a request, as for schedules, the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from telemetry import log_context, tracing

_REQUEST: Final = "request="


def current_origin() -> str | None:
    """Return the text for `trace_origin` of a run that the current request or run starts; None outside of both."""
    span = None if tracing.tracer is None else tracing.current_origin()
    return _join_fields(span, log_context.fields.get(log_context.EMPTY).get("request_id"))


def origin_of_child(execution_id: str, token: int, origin: str | None) -> str | None:
    """Return the text for `trace_origin` of a run that another run starts: the claim of the parent run, and the id of
    the request that started the parent.

    `execution_id` is that of the parent, `token` the fencing token of its claim, `origin` the text in its row. None in
    a process without traces if no request started the parent.
    """
    span = None
    if tracing.tracer is not None:
        segment = tracing.tracer.segment_context(execution_id, origin, token)
        span = tracing.encode_origin(segment, is_awaited=False)
    return _join_fields(span, find_request_id(origin))


def log_fields(execution_id: str, origin: str | None) -> Mapping[str, str]:
    """Return the fields of all log lines of a run: its id, and that of the request that started it, if there is one."""
    request_id = find_request_id(origin)
    if request_id is None:
        return {"execution_id": execution_id}
    return {"execution_id": execution_id, "request_id": request_id}


def find_request_id(origin: str | None) -> str | None:
    """Return the id of the request that started a run; None without one, as for schedules."""
    if origin is None:
        return None
    _, found, request_id = origin.rpartition(_REQUEST)
    return request_id if found else None


def _join_fields(span: str | None, request_id: str | None) -> str | None:
    if request_id is None:
        return span
    field = f"{_REQUEST}{request_id}"
    return field if span is None else f"{span} {field}"
