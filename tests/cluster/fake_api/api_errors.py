from __future__ import annotations

from typing import Any

Json = dict[str, Any]


class KubernetesError(Exception):
    """Error response of the API server."""

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


def too_many_requests_error(seconds: int) -> KubernetesError:
    refused = KubernetesError(429, "TooManyRequests", "too many requests, please try again later")
    refused.headers["Retry-After"] = str(seconds)
    return refused


def forbidden_error(verb: str, resource: str) -> KubernetesError:
    user = "system:serviceaccount:pilotflame:pilotflame-deployer"
    return KubernetesError(
        403, "Forbidden", f'{resource} is forbidden: User "{user}" cannot {verb} resource "{resource}"'
    )


def bad_request_error(message: str) -> KubernetesError:
    return KubernetesError(400, "BadRequest", message)


def invalid_error(kind: str, name: str, problems: list[str]) -> KubernetesError:
    text = problems[0] if len(problems) == 1 else f"[{', '.join(problems)}]"
    return KubernetesError(422, "Invalid", f'{kind} "{name}" is invalid: {text}')


def not_found_error(resource: str, name: str) -> KubernetesError:
    return KubernetesError(404, "NotFound", f'{resource} "{name}" not found')


def conflict_error(resource: str, name: str) -> KubernetesError:
    return KubernetesError(
        409,
        "Conflict",
        f'Operation cannot be fulfilled on {resource} "{name}": the object has been modified; '
        "please apply your changes to the latest version and try again",
    )
