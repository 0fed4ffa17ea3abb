"""Settings of traces, which all processes share."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings


class TraceSettings(BaseSettings):
    """Address, share and contents of the traces that a process sends."""

    otlp_url: str = Field(
        default="",
        pattern=r"^(https?://[^\s?#]+)?$",
        description=(
            "OpenTelemetry collector that gets traces by OTLP over HTTP: `http://collector:4318`. It needs the"
            " extra `pilotflame[otel]`. Unset: no traces."
        ),
    )
    trace_sample: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description=(
            "Share of the traces that are sent, from 0 to 1. Callers with a key decide it for their requests by"
            " the header `traceparent`."
        ),
    )
    trace_content: bool = Field(
        default=False,
        description=(
            "Whether spans of language models and their tools carry prompts, answers, arguments and results, up to"
            " 32 kB each, without values that look like credentials. Never those of nodes with `recordContent: false`."
        ),
    )
    trace_hosts: str = Field(
        default="",
        description=(
            "Hosts that get a `traceparent` from HTTP nodes, separated by commas: `api.example.com,*.internal`."
            " Unset: none."
        ),
    )
