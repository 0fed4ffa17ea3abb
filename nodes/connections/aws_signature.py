"""AWS Signature Version 4 in headers, for S3 and SQS: a pure function of the request and the time."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from urllib.parse import quote

UNRESERVED = "-_.~"
"""Characters that are not percent-encoded; the request must be encoded in the same way as the signed text."""


def encode_path(path: str) -> str:
    """Return a path percent-encoded for AWS, as it is signed and sent; slashes stay."""
    return quote(path, safe="/" + UNRESERVED)


def encode_query(query: Mapping[str, str]) -> str:
    """Return a query as it is signed for AWS and sent: percent-encoded and sorted by name."""
    pairs = sorted(
        (quote(name, safe=UNRESERVED), quote(value, safe=UNRESERVED)) for name, value in query.items()
    )
    return "&".join(f"{name}={value}" for name, value in pairs)


@dataclass(frozen=True, slots=True)
class AwsSigner:
    """Signer with credentials, for one region and service."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    region: str
    session_token: str | None = field(default=None, repr=False)
    service: str = "s3"

    def headers(
        self,
        method: str,
        host: str,
        path: str,
        query: Mapping[str, str],
        given: Mapping[str, str],
        body: bytes,
        now: datetime,
    ) -> dict[str, str]:
        """Return the headers of a signed request: `given`, and the headers of AWS Signature 4 (date, digest of the
        body, session token if any, and signature).

        `path` and `query` are not encoded yet, and `now` is in UTC. `host` is signed but not returned: the client adds
        it.
        """
        moment = now.strftime("%Y%m%dT%H%M%SZ")
        payload = sha256(body).hexdigest()
        sent = {**given, "x-amz-date": moment, "x-amz-content-sha256": payload}
        if self.session_token is not None:
            sent["x-amz-security-token"] = self.session_token
        lines = {name.lower(): " ".join(value.split()) for name, value in {**sent, "host": host}.items()}
        names = ";".join(sorted(lines))
        written = [f"{name}:{lines[name]}" for name in sorted(lines)]
        request = [method, encode_path(path), encode_query(query), *written, "", names, payload]
        scope = f"{moment[:8]}/{self.region}/{self.service}/aws4_request"
        signature = self._signature(moment, scope, "\n".join(request))
        credential = f"Credential={self.access_key_id}/{scope}"
        sent["authorization"] = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={names}, Signature={signature}"
        return sent

    def _signature(self, moment: str, scope: str, request: str) -> str:
        text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{sha256(request.encode()).hexdigest()}"
        key = f"AWS4{self.secret_access_key}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.digest(key, text.encode(), "sha256").hex()
