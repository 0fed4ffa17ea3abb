"""Imports of the Redis client without the libraries that it loads for metrics of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

METRICS_MODULES: Final = ("opentelemetry.metrics", "opentelemetry.sdk.metrics")
"""The client loads them wherever they are installed: 61 modules, 3 MB and 50 ms. It counts nothing without a call
of `redis.observability`, which no process makes.
"""


@contextmanager
def without_client_metrics() -> Iterator[None]:
    """Make the client's optional imports of metrics modules fail in this block, as if they were not installed.

    Modules that are loaded already stay. Other threads must not import these modules meanwhile.
    """
    # An entry of None makes an import fail; the type of `sys.modules` does not know that.
    modules = cast("dict[str, Any]", sys.modules)
    hidden = [name for name in METRICS_MODULES if name not in modules]
    modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del modules[name]
