"""OpenAPI document of the gateway's routes, built when a test first reads it.

At an import, every process of a run would build it, since each imports all files of tests.
"""

import functools
import json
from typing import Any

from gateway import routes
from gateway.openapi import openapi_document


@functools.cache
def read_document() -> dict[str, Any]:
    """Return the OpenAPI document as JSON, the same object at each call: callers must not change it."""
    document: dict[str, Any] = json.loads(json.dumps(openapi_document.build_document(routes.TABLE)))
    return document
