"""OpenID Connect provider: its metadata and keys, the exchange of a code, and the check of an ID token.

Authorization code flow with PKCE, by OpenID Connect Core 1.0, RFC 7636, RFC 8414 and RFC 9207. Everything that a
provider sends is checked before it is used; only asymmetric signatures count.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode, urlsafe_b64encode
from hashlib import sha256
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote_plus, urlencode, urlsplit

import msgspec
import structlog
from msgspec import Struct

from gateway.http.session_cookies import is_loopback_host
from json_text import decoding
from nodes.outbound_http import OutboundRefused, OutboundUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from nodes.outbound_http import OutboundClient, OutboundResponse

log = structlog.get_logger()

Document = TypeVar("Document")

ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Accepted signatures: `none` and secrets that both sides know are not among them."""
METADATA_SECONDS: Final = 3_600.0
KEYS_AGAIN_SECONDS: Final = 60.0
"""Time between two requests for the keys because of an unknown one."""
ANSWER_SECONDS: Final = 10.0
LEEWAY_SECONDS: Final = 60
LONGEST_SUBJECT: Final = 255
OK: Final = 200
CLIENT_ERROR: Final = 400
SERVER_ERROR: Final = 500


class ProviderUnavailable(Exception):
    """The provider does not answer, or not with a valid document; the same sign-in may succeed later."""


class ProviderRefusal(Exception):
    """The provider, or the check of its answer, refuses the sign-in."""


class ProviderMetadata(msgspec.Struct, frozen=True):
    """Part of the provider's discovery document that is used."""

    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    userinfo_endpoint: str | None = None
    token_endpoint_auth_methods_supported: tuple[str, ...] = ("client_secret_basic",)
    authorization_response_iss_parameter_supported: bool = False


class TokenAnswer(msgspec.Struct, frozen=True):
    """Answer of the token endpoint."""

    id_token: str
    access_token: str = ""


class ProviderClaims(Struct, frozen=True):
    """Verified claims about a person."""

    issuer: str
    subject: str
    email: str
    """Lower case; empty unless the provider says that it is verified."""
    name: str


class OpenIdClient(Struct, frozen=True):
    """Registration of this server at a provider."""

    issuer: str
    client_id: str
    client_secret: str
    """Empty for a public client."""
    scopes: str


class OpenIdProvider:
    """Provider at which people sign in."""

    def __init__(self, client: OpenIdClient, outbound: OutboundClient) -> None:
        """Set the registration, and the HTTP client with which the provider is asked."""
        self.client = client
        self._outbound = outbound
        self._metadata: tuple[float, ProviderMetadata] | None = None
        self._keys: tuple[float, Mapping[str, Any]] | None = None
        self._lock = asyncio.Lock()

    async def close(self) -> None:
        """Close the connections to the provider."""
        await self._outbound.close()

    async def authorization_url(self, redirect_uri: str, *, state: str, nonce: str, verifier: str) -> str:
        """Return the address at the provider to which a browser is sent to sign in.

        `state` and `nonce` tie answer and token to this attempt, `verifier` is the PKCE secret, of which only
        the challenge is sent. Raises `ProviderUnavailable` if the provider's discovery document can't be
        read.
        """
        metadata = await self.metadata()
        query = urlencode(
            {
                "response_type": "code",
                "client_id": self.client.client_id,
                "redirect_uri": redirect_uri,
                "scope": self.client.scopes,
                "state": state,
                "nonce": nonce,
                "code_challenge": challenge_of(verifier),
                "code_challenge_method": "S256",
            }
        )
        return f"{metadata.authorization_endpoint}{'&' if '?' in metadata.authorization_endpoint else '?'}{query}"

    async def fetch_claims(
        self, code: str, issuer: str | None, redirect_uri: str, *, nonce: str, verifier: str, now: datetime
    ) -> ProviderClaims:
        """Exchange a code of the provider for verified claims about the person; if the ID token has no e-mail
        address, `userinfo` is requested.

        `issuer` is the parameter `iss` of the answer, None if it has none; the ID token is verified at `now`.
        Raises `ProviderUnavailable`, and `ProviderRefusal` for a wrong issuer, code or token.
        """
        metadata = await self.metadata()
        if issuer is None and metadata.authorization_response_iss_parameter_supported:
            raise ProviderRefusal("the answer does not name its issuer")
        if issuer is not None and issuer != metadata.issuer:
            raise ProviderRefusal("the answer is from another issuer")
        tokens = await self._exchange(metadata, code, redirect_uri, verifier)
        found = await self._verify(tokens.id_token, nonce, now)
        if "email" not in found and metadata.userinfo_endpoint and tokens.access_token:
            found = {**await self._userinfo(metadata.userinfo_endpoint, tokens, found["sub"]), **found}
        return read_claims(self.client.issuer, found)

    async def metadata(self) -> ProviderMetadata:
        """Return the provider's discovery document, cached for an hour.

        Raises `ProviderUnavailable` if it can't be read within ten seconds, names another issuer, or an
        address without HTTPS.
        """
        async with self._lock:
            kept = self._metadata
            if kept is not None and monotonic() - kept[0] < METADATA_SECONDS:
                return kept[1]
            url = f"{self.client.issuer.rstrip('/')}/.well-known/openid-configuration"
            found = _decode(await self._get(url), ProviderMetadata)
            if found.issuer != self.client.issuer:
                raise ProviderUnavailable(f"its document names another issuer, {found.issuer}")
            for address in (found.authorization_endpoint, found.token_endpoint, found.jwks_uri):
                require_secure(address)
            self._metadata = (monotonic(), found)
            return found

    async def _exchange(
        self, metadata: ProviderMetadata, code: str, redirect_uri: str, verifier: str
    ) -> TokenAnswer:
        """Return the tokens for a code from the provider's token endpoint.

        Raises `ProviderRefusal` if the provider rejects the code, and `ProviderUnavailable` for other
        failures.
        """
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": verifier,
        }
        headers = {"content-type": "application/x-www-form-urlencoded", "accept": "application/json"}
        client_id, secret = self.client.client_id, self.client.client_secret
        if secret and "client_secret_basic" in metadata.token_endpoint_auth_methods_supported:
            pair = f"{quote_plus(client_id)}:{quote_plus(secret)}".encode()
            headers["authorization"] = f"Basic {b64encode(pair).decode()}"
        else:
            form |= {"client_id": client_id} | ({"client_secret": secret} if secret else {})
        answer = await self._request("POST", metadata.token_endpoint, headers, urlencode(form).encode())
        if CLIENT_ERROR <= answer.status < SERVER_ERROR:
            raise ProviderRefusal(f"the code was refused with {answer.status}")
        return _decode(_require_ok(answer), TokenAnswer)

    async def _verify(self, id_token: str, nonce: str, now: datetime) -> Mapping[str, Any]:
        """Return the claims of an ID token; for an unknown key, the provider's keys are read again once.

        Raises `ProviderRefusal` for an invalid token, and `ProviderUnavailable` if the keys can't be read.
        """
        keys = await self._read_keys()
        try:
            return verify_id_token(id_token, keys, self.client, nonce, now)
        except UnknownKey:
            # The provider may have changed its key a moment ago.
            keys = await self._read_keys(is_stale=True)
        try:
            return verify_id_token(id_token, keys, self.client, nonce, now)
        except UnknownKey as error:
            raise ProviderRefusal("the ID token is signed with an unknown key") from error

    async def _read_keys(self, *, is_stale: bool = False) -> Mapping[str, Any]:
        """Return the provider's signing keys, cached for an hour, or for a minute with `is_stale`; raises
        `ProviderUnavailable`.
        """
        metadata = await self.metadata()
        async with self._lock:
            kept = self._keys
            lifetime = KEYS_AGAIN_SECONDS if is_stale else METADATA_SECONDS
            if kept is not None and monotonic() - kept[0] < lifetime:
                return kept[1]
            keys: Mapping[str, Any] = _decode(await self._get(metadata.jwks_uri), dict[str, Any])
            self._keys = (monotonic(), keys)
            return keys

    async def _userinfo(self, url: str, tokens: TokenAnswer, subject: str) -> Mapping[str, Any]:
        """Return the claims of the provider's `userinfo`.

        Raises `ProviderRefusal` if they are about another subject, and `ProviderUnavailable` without a valid answer.
        """
        require_secure(url)
        headers = {"authorization": f"Bearer {tokens.access_token}", "accept": "application/json"}
        found: Mapping[str, Any] = _decode(
            _require_ok(await self._request("GET", url, headers, None)), dict[str, Any]
        )
        if found.get("sub") != subject:
            raise ProviderRefusal("userinfo is about another person")
        return found

    async def _get(self, url: str) -> OutboundResponse:
        """Return the provider's answer to GET; raises `ProviderUnavailable` for other statuses than 200."""
        return _require_ok(await self._request("GET", url, {"accept": "application/json"}, None))

    async def _request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> OutboundResponse:
        """Send a request to the provider and return the answer with any status, within ten seconds; redirects
        are not followed.

        Raises `ProviderUnavailable` for an address without HTTPS, and without an answer.
        """
        require_secure(url)
        try:
            return await self._outbound.request(
                method,
                url,
                headers=headers,
                body=body,
                timeout_seconds=ANSWER_SECONDS,
                follow_redirects=False,
            )
        except OutboundUnavailable as error:
            raise ProviderUnavailable(str(error)) from error
        except OutboundRefused as error:
            raise ProviderUnavailable(error.message) from error


class UnknownKey(Exception):
    """No key of the provider has the id that a token names."""


def verify_id_token(
    text: str, keys: Mapping[str, Any], client: OpenIdClient, nonce: str, now: datetime
) -> Mapping[str, Any]:
    """Return the claims of an ID token after the checks of OpenID Connect Core 3.1.3.7, with a minute of leeway.

    They are signature (asymmetric keys only), issuer, audience, times and nonce. `keys` is the provider's JWK Set.
    Raises `ProviderRefusal` for a token that fails one, and `UnknownKey` if the provider's keys should be read again.
    """
    from joserfc import jwt  # noqa: PLC0415 - loaded by servers with a provider alone
    from joserfc.errors import InvalidKeyIdError, JoseError  # noqa: PLC0415 - see above
    from joserfc.jwk import KeySet  # noqa: PLC0415 - see above

    asymmetric = [
        key
        for key in keys.get("keys", ())
        if isinstance(key, dict) and key.get("kty") in {"RSA", "EC", "OKP"} and key.get("use", "sig") == "sig"
    ]
    rules = jwt.JWTClaimsRegistry(
        now=int(now.timestamp()),
        leeway=LEEWAY_SECONDS,
        iss={"essential": True, "value": client.issuer},
        aud={"essential": True, "value": client.client_id},
        sub={"essential": True},
        exp={"essential": True},
        iat={"essential": True},
        nonce={"essential": True, "value": nonce},
    )
    try:
        token = jwt.decode(text, KeySet.import_key_set({"keys": asymmetric}), algorithms=[*ALGORITHMS])
        rules.validate(token.claims)
    except InvalidKeyIdError as error:
        raise UnknownKey from error
    except (JoseError, ValueError, TypeError, KeyError) as error:
        raise ProviderRefusal(f"the ID token is not valid: {error}") from error
    claims: Mapping[str, Any] = token.claims
    audience = claims["aud"]
    parties = [audience] if isinstance(audience, str) else audience
    if claims.get("azp", client.client_id if len(parties) == 1 else None) != client.client_id:
        raise ProviderRefusal("the ID token is for another application")
    return claims


def read_claims(issuer: str, claims: Mapping[str, Any]) -> ProviderClaims:
    """Return the part of verified claims that is used: subject, address in lower case, and name.

    The address is empty unless the provider has verified it. Raises `ProviderRefusal` for a subject that is
    empty or over 255 characters.
    """
    subject, email, name = claims.get("sub"), claims.get("email"), claims.get("name")
    if not isinstance(subject, str) or not 0 < len(subject) <= LONGEST_SUBJECT:
        raise ProviderRefusal("the ID token names no subject")
    is_verified = claims.get("email_verified") is True or claims.get("email_verified") == "true"
    return ProviderClaims(
        issuer=issuer,
        subject=subject,
        email=email.lower() if is_verified and isinstance(email, str) else "",
        name=name if isinstance(name, str) else "",
    )


def challenge_of(verifier: str) -> str:
    """Return the PKCE challenge of a verifier: its SHA-256 in base64url without padding (method `S256`)."""
    return urlsafe_b64encode(sha256(verifier.encode()).digest()).decode().rstrip("=")


def require_secure(url: str) -> None:
    """Raise `ProviderUnavailable` for an address without HTTPS; plain HTTP is permitted to this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback_host(parts.hostname or "")):
        raise ProviderUnavailable(f"{url} is not an address with HTTPS")


def _require_ok(answer: OutboundResponse) -> OutboundResponse:
    """Return an answer with status 200 unchanged; raises `ProviderUnavailable` for other statuses."""
    if answer.status != OK:
        raise ProviderUnavailable(f"{answer.url} answered {answer.status}")
    return answer


def _decode(answer: OutboundResponse, kind: type[Document]) -> Document:
    """Decode an answer's JSON as `kind`; raises `ProviderUnavailable` for anything else."""
    try:
        return decoding.decode(answer.body, kind)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProviderUnavailable(f"{answer.url} did not answer with the expected JSON") from error
