"""The four kinds of patches but apply: merge (RFC 7386), strategic merge, and JSON patch (RFC 6902)."""

from __future__ import annotations

import copy
from typing import Any

from tests.cluster.fake_api.api_errors import Json, KubernetesError
from tests.cluster.fake_api.ownership import item_key, merge_keyed


def merge(live: Json, patch: Json) -> Json:
    """Return an object with a merge patch (RFC 7386) applied."""
    result = copy.deepcopy(live)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            present = result.get(name)
            result[name] = merge(present if isinstance(present, dict) else {}, value)
        else:
            result[name] = copy.deepcopy(value)
    return result


def apply_strategic_patch(live: Json, patch: Json) -> Json:
    """Return an object with a strategic merge patch applied: keyed lists are merged by their keys."""
    result = copy.deepcopy(live)
    for name, value in patch.items():
        present = result.get(name)
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            result[name] = apply_strategic_patch(present if isinstance(present, dict) else {}, value)
        elif (
            isinstance(value, list)
            and isinstance(present, list)
            and all(item_key(name, one) for one in value)
        ):
            result[name] = merge_keyed(name, present, value)
        else:
            result[name] = copy.deepcopy(value)
    return result


def apply_json_patch(live: Json, patch: list[Json]) -> Json:
    """Return an object with a JSON patch (RFC 6902) applied; raises `KubernetesError` for a failed test."""
    result = copy.deepcopy(live)
    for one in patch:
        *parents, last = one["path"].removeprefix("/").split("/")
        holder: Any = result
        for part in parents:
            holder = holder[int(part)] if isinstance(holder, list) else holder[_unescape(part)]
        last = _unescape(last)
        place = int(last) if isinstance(holder, list) and last != "-" else last
        match one["op"]:
            case "test" if holder[place] != one["value"]:
                raise KubernetesError(
                    422, "Invalid", "the server rejected our request due to an error in our request"
                )
            case "add" if isinstance(holder, list):
                holder.insert(len(holder) if last == "-" else int(last), one["value"])
            case "add" | "replace":
                holder[place] = one["value"]
            case "remove":
                del holder[place]
    return result


def _unescape(part: str) -> str:
    return part.replace("~1", "/").replace("~0", "~")
