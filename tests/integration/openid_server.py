"""Strict OpenID Connect provider on loopback: it refuses every request that breaks the protocol, and notes why.

Tests sign people in by `authorize`, and make it misbehave by `changes` of the claims, `headers` and `key`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from base64 import b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import time
from typing import Any
from urllib.parse import parse_qsl, unquote_plus, urlencode, urlsplit

import uvicorn
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey, RSAKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse
from starlette.routing import Mount, Route

from gateway.access.openid_provider import challenge_of

CLIENT_ID = "pilotflame"
CLIENT_SECRET = "a secret: with + signs % and ünicode"


@dataclass
class OpenIdServer:
    """State of the provider."""

    issuer: str = ""
    person: dict[str, Any] = field(
        default_factory=lambda: {"sub": "person-1", "email": "Grace@Example.com", "email_verified": True}
    )
    changes: dict[str, Any] = field(default_factory=dict)
    """Claims of the next ID tokens that differ from the right ones; None leaves one out."""
    header: dict[str, Any] = field(default_factory=dict)
    """Fields of the header of the next ID tokens that differ."""
    signing_key: Any = None
    """Key of the next ID tokens; by default one of the published keys."""
    has_email_in_token: bool = True
    answer_issuer: str | None = ""
    """Parameter `iss` of answers; empty: the right one, None: absent."""
    key: Any = field(default_factory=lambda: ECKey.generate_key("P-256", {"kid": "first", "use": "sig"}))
    published: list[Any] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Violations of the protocol by the client."""
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    is_down: bool = False

    def __post_init__(self) -> None:
        self.published = [self.key]

    def rotate(self) -> None:
        """Replace the signing key by a new one, which alone is published from now on."""
        self.key = RSAKey.generate_key(2048, {"kid": "second", "use": "sig"})
        self.published = [self.key]

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self.configuration),
                Route("/keys", self.keys),
                Route("/authorize", self.authorize),
                Route("/token", self.token, methods=["POST"]),
                Route("/userinfo", self.userinfo),
            ]
        )

    async def configuration(self, _request: Request) -> JSONResponse:
        if self.is_down:
            return JSONResponse({}, 500)
        return JSONResponse(
            {
                "issuer": self.issuer,
                "authorization_endpoint": f"{self.issuer}/authorize",
                "token_endpoint": f"{self.issuer}/token",
                "jwks_uri": f"{self.issuer}/keys",
                "userinfo_endpoint": f"{self.issuer}/userinfo",
                "token_endpoint_auth_methods_supported": ["client_secret_basic"],
                "authorization_response_iss_parameter_supported": True,
                "code_challenge_methods_supported": ["S256"],
            }
        )

    async def keys(self, _request: Request) -> JSONResponse:
        shared = OctKey.import_key("a shared secret of more than thirty-two characters", {"kid": "shared"})
        keys = [key.as_dict(private=False) for key in self.published]
        return JSONResponse({"keys": [*keys, {**shared.as_dict(), "kid": "shared", "alg": "HS256"}]})

    async def authorize(self, request: Request) -> RedirectResponse | JSONResponse:
        """Sign the person in at once, and redirect to the client with a code;
        wrong parameters are recorded as problems.
        """
        query = dict(request.query_params)
        wanted = {"response_type": "code", "client_id": CLIENT_ID, "code_challenge_method": "S256"}
        for name, value in wanted.items():
            self.require(query.get(name) == value, f"{name} is {query.get(name)}")
        for name in ("state", "nonce", "code_challenge"):
            self.require(len(query.get(name, "")) >= 43, f"{name} is too short")
        self.require("openid" in query.get("scope", "").split(), "the scope openid is missing")
        self.require(query["redirect_uri"].endswith("/session/openid/callback"), "another redirect_uri")
        code = secrets.token_urlsafe(32)
        self.codes[code] = query
        answer = {"code": code, "state": query["state"]}
        if self.answer_issuer is not None:
            answer["iss"] = self.answer_issuer or self.issuer
        return RedirectResponse(f"{query['redirect_uri']}?{urlencode(answer)}", 302)

    async def token(self, request: Request) -> JSONResponse:
        """Return tokens for a code, once; violations of the protocol by the client are recorded as problems."""
        form = dict(parse_qsl((await request.body()).decode(), keep_blank_values=True))
        scheme, _, pair = request.headers.get("authorization", "").partition(" ")
        name, _, secret = b64decode(pair).decode().partition(":")
        is_client = (scheme, unquote_plus(name), unquote_plus(secret)) == ("Basic", CLIENT_ID, CLIENT_SECRET)
        self.require(is_client, "wrong client authentication")
        self.require("client_secret" not in form, "the secret is sent twice")
        asked = self.codes.pop(form.get("code", ""), None)  # each code works once
        if asked is None or form.get("grant_type") != "authorization_code":
            return JSONResponse({"error": "invalid_grant"}, 400)
        self.require(form.get("redirect_uri") == asked["redirect_uri"], "another redirect_uri")
        if challenge_of(form.get("code_verifier", "")) != asked["code_challenge"]:
            self.problems.append("the verifier is not that of the challenge")
            return JSONResponse({"error": "invalid_grant"}, 400)
        return JSONResponse(
            {"access_token": "access", "token_type": "Bearer", "id_token": self._id_token(asked["nonce"])}
        )

    async def userinfo(self, request: Request) -> JSONResponse:
        self.require(request.headers.get("authorization") == "Bearer access", "no access token")
        return JSONResponse(self.person)

    def require(self, holds: bool, problem: str) -> None:  # noqa: FBT001 - a condition
        """Record a problem unless the condition holds."""
        if not holds:
            self.problems.append(problem)

    def _id_token(self, nonce: str) -> str:
        """Return a signed ID token for the person, with the changed claims and header; None removes a claim."""
        now = int(time())
        person = self.person if self.has_email_in_token else {"sub": self.person["sub"]}
        claims = {
            "iss": self.issuer,
            "aud": CLIENT_ID,
            "iat": now,
            "exp": now + 300,
            "nonce": nonce,
            **person,
        }
        for name, value in self.changes.items():
            claims[name] = value
            if value is None:
                del claims[name]
        key = self.signing_key or self.key
        algorithm = {"EC": "ES256", "RSA": "RS256", "oct": "HS256"}[key.key_type]
        header = {"alg": algorithm, "kid": key.kid, **self.header}
        return jwt.encode(header, claims, key, algorithms=["ES256", "RS256", "HS256"])


def forge_token(claims: Mapping[str, Any], *, secret: bytes | None) -> str:
    """Return an ID token with the algorithm `none`, or one that is signed with a secret, such as a public key."""
    header = {"alg": "none" if secret is None else "HS256", "kid": "first"}
    text = ".".join(_encode(json.dumps(part).encode()) for part in (header, claims))
    signature = b"" if secret is None else hmac.digest(secret, text.encode(), "sha256")
    return f"{text}.{_encode(signature)}"


def _encode(part: bytes) -> str:
    return urlsafe_b64encode(part).decode().rstrip("=")


@asynccontextmanager
async def serve_openid() -> AsyncIterator[OpenIdServer]:
    """Serve a provider on a free port during the block, with an issuer of its own.

    Ports are used again, and identities stay in the database.
    """
    openid, realm = OpenIdServer(), f"/{secrets.token_hex(8)}"
    config = uvicorn.Config(
        Starlette(routes=[Mount(realm, openid.app())]),
        host="127.0.0.1",
        port=0,
        log_config=None,
        lifespan="off",
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - it sets no event
        await asyncio.sleep(0.01)
    openid.issuer = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}{realm}"
    try:
        yield openid
    finally:
        server.should_exit = True
        await serving


def path_of(url: str) -> str:
    """Return path and query of a URL."""
    parts = urlsplit(url)
    return parts.path + (f"?{parts.query}" if parts.query else "")
