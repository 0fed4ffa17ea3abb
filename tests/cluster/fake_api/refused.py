from __future__ import annotations

from typing import Any

Json = dict[str, Any]


class Refused(Exception):
    """An answer other than success, as the API server gives it."""

    def __init__(self, status: int, reason: str, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.metadata = metadata
        self.headers: dict[str, str] = {}

    @property
    def body(self) -> Json:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": self.metadata,
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "code": self.status,
        }


def too_many_requests(seconds: int) -> Refused:
    refused = Refused(429, "TooManyRequests", "too many requests, please try again later")
    refused.headers["Retry-After"] = str(seconds)
    return refused


def forbidden(verb: str, resource: str) -> Refused:
    user = "system:serviceaccount:pilotflame:pilotflame-deployer"
    return Refused(
        403, "Forbidden", f'{resource} is forbidden: User "{user}" cannot {verb} resource "{resource}"'
    )


def bad_request(message: str) -> Refused:
    return Refused(400, "BadRequest", message)


def invalid(kind: str, name: str, problems: list[str]) -> Refused:
    text = problems[0] if len(problems) == 1 else f"[{', '.join(problems)}]"
    return Refused(422, "Invalid", f'{kind} "{name}" is invalid: {text}')


def not_found(resource: str, name: str) -> Refused:
    return Refused(404, "NotFound", f'{resource} "{name}" not found')


def conflict(resource: str, name: str) -> Refused:
    return Refused(
        409,
        "Conflict",
        f'Operation cannot be fulfilled on {resource} "{name}": the object has been modified; '
        "please apply your changes to the latest version and try again",
    )
