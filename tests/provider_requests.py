"""Requests in `tests/payloads` with their expected results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from senders.sender_request import RequestHeaders, SenderRequest

FOLDER: Final = Path(__file__).parent / "payloads"
CONFIG: Final[dict[str, Any]] = json.loads((FOLDER / "keys/config.json").read_bytes())


@dataclass(frozen=True)
class ProviderStep:
    """One request of a case, and its expected result."""

    name: str
    method: str
    target: str
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes
    at: datetime
    auth: Mapping[str, Any]
    respond: Mapping[str, Any]

    def __str__(self) -> str:
        return self.name

    @property
    def arrival(self) -> SenderRequest:
        """Request of the step as ingest gets it."""
        return build_request(self.body, self.headers, self.at, method=self.method, target=self.target)


@dataclass(frozen=True)
class ProviderCase:
    """One or several requests of a provider that belong together, with the expected result."""

    name: str
    provider: str
    expected: Mapping[str, Any]
    steps: Sequence[ProviderStep]

    def __str__(self) -> str:
        return self.name

    @property
    def arrival(self) -> SenderRequest:
        """Only request of the case, as ingest gets it; raises ValueError for a case with several."""
        (step,) = self.steps
        return step.arrival


def build_request(
    body: bytes,
    headers: Iterable[tuple[bytes, bytes]],
    at: datetime,
    *,
    method: str = "POST",
    target: str = "/",
) -> SenderRequest:
    address = urlsplit(target)
    return SenderRequest(method, address.path, parse_qs(address.query), RequestHeaders(headers), body, at)


def read_certificate(url: str) -> bytes:
    """Return the certificate that the fake SNS serves at an address."""
    name: str = CONFIG["sns"]["certificates"][url]
    return (FOLDER / "keys" / name).read_bytes()


def _parse_case(entry: Mapping[str, Any]) -> ProviderCase:
    expected = json.loads((FOLDER / entry["expected"]).read_bytes())
    steps = [_parse_step(expected, step) for step in expected.get("steps", [expected])]
    return ProviderCase(entry["name"], entry["provider"], expected, steps)


def _parse_step(expected: Mapping[str, Any], step: Mapping[str, Any]) -> ProviderStep:
    head, _, body = (FOLDER / step["request"]).read_bytes().partition(b"\r\n\r\n")
    request_line, *lines = head.split(b"\r\n")
    method, target, _ = request_line.decode().split(" ")
    headers = [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    at = datetime.fromisoformat(step["respond"].get("at", expected["clock"]))
    return ProviderStep(
        Path(step["request"]).stem, method, target, headers, body, at, step["auth"], step["respond"]
    )


CASES: Final = [_parse_case(entry) for entry in json.loads((FOLDER / "index.json").read_bytes())["cases"]]
VECTORS: Final[list[dict[str, Any]]] = json.loads((FOLDER / "vectors.json").read_bytes())["vectors"]
BY_NAME: Final = {case.name: case for case in CASES}
