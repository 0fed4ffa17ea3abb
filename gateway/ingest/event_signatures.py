"""Verification of event signatures, with the secrets that an event token stores for each provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from concurrency import offload
from gateway.http import errors
from gateway.http.errors import ApiError
from json_text import decoding
from models.encryption import VaultError
from senders import event_senders, github, slack, standard_webhooks, stripe
from senders.event_senders import EventSender as Provider
from senders.request_refusal import RequestRefused

if TYPE_CHECKING:
    from gateway.http.sender import RequestSender
    from models.encryption import EncryptedText, SecretVault
    from senders.sender_request import SenderRequest
    from senders.signatures import SignatureResult

log = structlog.get_logger()

Secrets = dict[Provider, list[str]]
"""Signing secrets of each provider; several during a rotation."""

VERIFIERS: Final[Mapping[Provider, Callable[[SenderRequest, Sequence[str]], SignatureResult]]] = {
    Provider.GITHUB: github.verify,
    Provider.STRIPE: stripe.verify,
    Provider.SLACK: slack.verify,
    Provider.STANDARD_WEBHOOKS: standard_webhooks.verify,
}
_OF_SIGNATURES: Final = frozenset({"missing-signature", "invalid-signature", "stale-signature", "no-secret"})
_encode = msgspec.json.Encoder().encode
_decode = decoding.build_decoder(Secrets).decode


def seal_secrets(
    vault: SecretVault, secrets: Secrets, *, organization_id: str, token_id: str
) -> EncryptedText:
    """Encrypt the secrets of an event token, a list for each provider, as one ciphertext for storage.

    The ids of the organization and the token are bound to it: it can't be decrypted for another token.
    """
    return vault.encrypt(_encode(secrets), organization_id=organization_id, object_id=token_id)


async def verify_event(request: SenderRequest, sender: RequestSender, vault: SecretVault) -> Provider | None:
    """Verify the signature of an event that is sent with a token; return the provider or format that its headers name,
    None for the API's own format.

    A request with an API key needs no signature, and its provider is not verified; CloudEvents have none. With a token,
    requests of a provider known to sign must be signed, and a token with secrets accepts signed requests only. Raises
    the errors of `refusal_error`, such as 401, and 503 when the secrets can't be read.
    """
    try:
        claimed = event_senders.recognize_sender(request)
        if sender.token is not None:
            await offload.run(_require_signature, request, claimed, _decrypt_secrets(sender, vault))
    except RequestRefused as error:
        raise refusal_error(error) from error
    return claimed


def _require_signature(request: SenderRequest, claimed: Provider | None, secrets: Secrets) -> None:
    """Raise `RequestRefused` unless a request of the claimed provider has a valid signature; None claims no
    provider.

    Any secrets of the token demand a signature.
    """
    verifier = None if claimed is None else VERIFIERS.get(claimed)
    if claimed is not None and verifier is not None:
        verifier(request, secrets.get(claimed, []))
    elif secrets:
        raise RequestRefused(
            "missing-signature", "The request is not signed, but this token requires a signature"
        )


def refusal_error(error: RequestRefused) -> ApiError:
    """Return the API error for a request refused by a sender adapter: 401 for signatures, 413, 415, or 400
    for others.
    """
    if error.code in _OF_SIGNATURES:
        return ApiError(401, "invalid-signature", error.message)
    if error.code == "too-large":
        return ApiError(413, "payload-too-large", error.message)
    if error.code == "unsupported-media-type":
        return ApiError(415, error.code, error.message)
    return ApiError(400, error.code, error.message)


def _decrypt_secrets(sender: RequestSender, vault: SecretVault) -> Secrets:
    """Return the signing secrets of the sender's event token by provider, {} without any; raises a 503 error
    if unreadable.
    """
    token = sender.token
    if token is None or token.encrypted is None:
        return {}
    try:
        text = vault.decrypt(token.encrypted, organization_id=token.organization_id, object_id=token.id)
    except VaultError as error:
        log.error("secrets of an event token not opened", token_id=token.id, reason=str(error))  # noqa: TRY400 - the reason says it
        raise errors.not_ready("The secrets of this token can't be read: tell the operator") from error
    return _decode(text)
