"""Copies of blobs for a redrive: blobs belong to one run and are deleted with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from gateway.http import errors
from gateway.ingest.ingest import RunInput
from journal import unparsed_mail
from journal.blobs import large_values
from journal.blobs.blob_reference import BlobReference, InvalidBlobReference
from journal.blobs.blob_storage import BlobLost, BlobOwner, BlobsUnavailable
from journal.unparsed_mail import UnparsedMail
from json_text import decoding
from models import ids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.values import Json
    from gateway.http.errors import ApiError
    from journal.blobs.blob_store import BlobStore
    from journal.store import IdempotencyKey


async def build_redrive_input(
    blobs: BlobStore, given: str, source: BlobOwner | None, idempotency_key: IdempotencyKey | None
) -> RunInput:
    """Return the input of a new run that runs the trigger output `given` (JSON text) of an earlier run again.

    The blobs that `given` references are copied from the earlier run `source`, None without stored blobs, to a new
    execution id, which the input contains, like `idempotency_key`. A lost attachment keeps its reference, with which
    the node that reads it fails. An unparsed mail is parsed again, without the rules that may have rejected it. Raises
    a 409 error if a stored mail or body can't be copied, since it is gone or `source` is None, and 503 if the blob
    storage does not answer.
    """
    execution_id = ids.new_id("exec")
    if large_values.has_separate_body(given):
        trigger = await _copy_body(blobs, given, source, execution_id)
        return RunInput(trigger, given, idempotency_key=idempotency_key, execution_id=execution_id)
    trigger = decoding.decode(given)
    is_read = not unparsed_mail.is_unparsed(given)
    if not is_read:
        mail = msgspec.structs.replace(UnparsedMail.from_text(given), screening=None)
        trigger, blob = mail.as_json(), mail.blob
        if blob is not None and (source is None or not await _copy_blob(blobs, source, execution_id, blob)):
            raise _blob_missing()
    elif source is not None:
        for reference in _iterate_attached_blobs(trigger):
            # If a blob is gone, the node that reads it fails with that error.
            await _copy_blob(blobs, source, execution_id, reference)
    return RunInput(
        trigger=trigger, idempotency_key=idempotency_key, is_read=is_read, execution_id=execution_id
    )


async def _copy_body(blobs: BlobStore, given: str, source: BlobOwner | None, execution_id: str) -> Json:
    """Copy the stored webhook body that `given` (a trigger output as JSON text) references to the blobs of an
    execution; return the decoded output, with the content of the body in place of the reference.

    Raises a 409 error if the body is gone or `source` is None, and 503 if the blob storage does not answer.
    """
    if source is None or not await _copy_blob(
        blobs, source, execution_id, large_values.find_reference(given)
    ):
        raise _blob_missing()
    try:
        return await large_values.read_body(given, blobs, source)
    except BlobLost as error:
        raise _blob_missing() from error
    except BlobsUnavailable as error:
        raise errors.not_ready(f"{error}: try again") from error


def _blob_missing() -> ApiError:
    return errors.conflict("not-redrivable", "The content of the request is no longer stored")


def _iterate_attached_blobs(trigger: Json) -> Iterator[BlobReference]:
    """Yield the valid blob references in the attachments of a trigger output; none if it has no attachments."""
    attachments = trigger.get("attachments") if isinstance(trigger, dict) else None
    for attachment in attachments if isinstance(attachments, list) else ():
        if isinstance(attachment, dict) and "blob" in attachment:
            try:
                yield BlobReference.from_value(attachment["blob"])
            except InvalidBlobReference:
                continue


async def _copy_blob(
    blobs: BlobStore, source: BlobOwner, execution_id: str, reference: BlobReference
) -> bool:
    """Copy a blob of the source to the blobs of an execution of the same organization; return False if it is gone.

    Raises a 503 error if the blob storage does not answer.
    """
    try:
        return await blobs.copy(source, BlobOwner(source.organization_id, execution_id), reference)
    except BlobsUnavailable as error:
        raise errors.not_ready(f"{error}: try again") from error
