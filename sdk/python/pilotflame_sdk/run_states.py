"""State of a run, as far as answers have told it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pilotflame_sdk import request_coding
from pilotflame_sdk.errors import RunFailed


class RunState:
    """Run of a workflow, with its state as of the last answer."""

    def __init__(self, execution_id: str, state: Mapping[str, Any] | None = None) -> None:
        self.id = execution_id
        self.status = "pending"
        """`pending`, `running`, `waiting`, `completed`, `failed`, `stopped` or `cancelled`."""
        self.outputs: dict[str, Any] = {}
        """Outputs by node id."""
        self.error: Mapping[str, Any] | None = None
        """Error of a failed run."""
        self.progress = 0
        """Percent of the nodes that have ended."""
        self.lacks_outputs = False
        """Whether outputs are too large for the answer so far."""
        if state is not None:
            self.take(state)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.status}>"

    @property
    def path(self) -> str:
        """Path of the execution in the API, such as `/api/v1/executions/exec_1`."""
        return f"/api/v1/executions/{request_coding.quote_segment(self.id)}"

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended: completed, failed, stopped or cancelled."""
        return self.status in request_coding.TERMINAL

    def take(self, answer: Mapping[str, Any]) -> None:
        """Copy status, error, progress (percent) and outputs from an answer of the server."""
        self.status = str(answer["status"])
        self.error = answer.get("error")
        self.progress = int(answer.get("progress") or (100 if self.status == "completed" else 0))
        self.take_outputs(answer)
        self.lacks_outputs = bool(answer.get("outputsOmitted")) or any(
            map(_is_omitted, self.outputs.values())
        )

    def take_outputs(self, answer: Mapping[str, Any]) -> None:
        """Replace the outputs by those of an answer, which must have all of them."""
        self.outputs = dict(answer.get("outputs") or {})
        self.lacks_outputs = False

    def outputs_or_raise(self) -> dict[str, Any]:
        """Return the outputs of a completed run by node id; raises `RunFailed` for a run with any other status."""
        if self.status != "completed":
            raise RunFailed(self.id, self.status, self.error)
        return self.outputs


def _is_omitted(output: object) -> bool:
    """Return whether an output is only a reference to a large value that the answer leaves out."""
    return isinstance(output, dict) and output.keys() == {"$blob", "omitted"}


def poll_seconds(wanted: float) -> int:
    """Return the whole seconds, 0 to 30, for which one request waits."""
    return max(0, min(int(wanted), request_coding.POLL_SECONDS))


def prefer_header(wait: float) -> dict[str, str]:
    """Return the header that lets a start answer after the end of the run or `wait` seconds, at most 60;
    empty for less than 1.
    """
    seconds = min(int(wait), request_coding.PREFER_SECONDS)
    return {"Prefer": f"wait={seconds}"} if seconds > 0 else {}


def start_fields(
    inputs: Mapping[str, Any] | None, tags: object, metadata: object, others: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the JSON body of a request that starts a run; None values are left out when it is sent."""
    return {"triggerInputs": inputs, "tags": tags, "metadata": metadata, **others}
