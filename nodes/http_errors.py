"""Errors of nodes that use HTTP, with the method and the URL of the request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.run_errors import HttpRequestName, NodeError
from nodes import url_targets
from nodes.outbound_http import OutboundRefused, OutboundUnavailable


@contextmanager
def name_request_in_errors(method: str, url: str) -> Iterator[None]:
    """Convert failures of the block's request to `NodeError`s that begin with its method and URL, secrets redacted.

    Errors of an unreachable server may be retried, refusals not.
    """
    try:
        yield
    except NodeError as error:
        raise _add_request(method, url, error.message, error.code, retryable=error.retryable) from error
    except OutboundRefused as error:
        raise _add_request(method, url, error.message, error.code.value, retryable=False) from error
    except OutboundUnavailable as error:
        raise _add_request(method, url, error.message, error.code.value, retryable=True) from error


def _add_request(method: str, url: str, message: str, code: str, *, retryable: bool) -> NodeError:
    request = HttpRequestName(method, url_targets.redact_url(url))
    shown = " ".join(request).rstrip()
    return NodeError(
        f"{shown}: {message[:1].upper()}{message[1:]}", code=code, retryable=retryable, request=request
    )
