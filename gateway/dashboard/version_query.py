"""Query for the newest versions of a workflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def query_newest_versions(workflow: Mapping[str, Any], count: int) -> Mapping[str, object]:
    """Return the limit and offset with which the API lists the newest `count` versions of a workflow.

    The oldest come first in the list, and versions are numbered consecutively.
    """
    skipped = max(workflow["version"] - count, 0)
    return {"limit": count, "offset": skipped or None}
