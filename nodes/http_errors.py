"""Errors of nodes that use HTTP, with the method and the URL of the request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.run_errors import HttpRequestName, NodeError
from nodes import url_targets
from nodes.outbound_http import OutboundRefused, OutboundUnavailable

if TYPE_CHECKING:
    from types import TracebackType


class NamedRequest:
    """HTTP request of a block: its failures become `NodeError`s that begin with its method and URL, secrets redacted.

    Errors of an unreachable server may be retried, refusals not. It is no generator: the frame of one refers to the
    error, whose traceback refers to the frame, and both would keep the values of the run until a garbage collection.
    """

    def __init__(self, method: str, url: str) -> None:
        self._method = method
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, NodeError):
            raise self._add_request(error.message, error.code, retryable=error.retryable) from error
        if isinstance(error, OutboundRefused | OutboundUnavailable):
            is_retryable = isinstance(error, OutboundUnavailable)
            raise self._add_request(error.message, error.code.value, retryable=is_retryable) from error

    def _add_request(self, message: str, code: str, *, retryable: bool) -> NodeError:
        request = HttpRequestName(self._method, url_targets.redact_url(self._url))
        shown = " ".join(request).rstrip()
        return NodeError(
            f"{shown}: {message[:1].upper()}{message[1:]}", code=code, retryable=retryable, request=request
        )
