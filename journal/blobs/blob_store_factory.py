"""Creation of the blob store that the settings name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from journal.blobs.blob_store import BlobStore
from journal.blobs.folder_storage import FolderBlobStorage
from models.settings import InvalidSettings

if TYPE_CHECKING:
    from obstore.store import S3Config

    from journal.blobs.blob_storage import ManagedBlobStorage
    from models.settings import ServerSettings

BLOBS_FOLDER: Final = "blobs"
_BUCKET_URL: Final = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([\w./=-]*))?", re.ASCII)


def open_blobs(settings: ServerSettings) -> BlobStore:
    """Return the blob store of the settings: a bucket if `blob_url` names one, else the folder `blobs` in `data_dir`.

    Raises `InvalidSettings` for a malformed `blob_url`, and if the extra `s3`, which a bucket needs, is not
    installed.
    """
    return BlobStore(_open_storage(settings))


def _open_storage(settings: ServerSettings) -> ManagedBlobStorage:
    if not settings.blob_url:
        return FolderBlobStorage(settings.data_dir / BLOBS_FOLDER)
    match = _BUCKET_URL.fullmatch(settings.blob_url)
    if match is None:
        raise InvalidSettings("PILOTFLAME_BLOB_URL must be empty or like s3://bucket/prefix")
    try:
        from journal.blobs.bucket_storage import BucketBlobStorage  # noqa: PLC0415 - its library is installed only with the extra
    except ImportError as error:
        raise InvalidSettings(
            "PILOTFLAME_BLOB_URL names a bucket, which needs: pip install 'pilotflame[s3]'"
        ) from error
    endpoint = settings.blob_s3_endpoint
    config: S3Config = {"region": settings.blob_s3_region}
    if endpoint:
        config["endpoint"] = endpoint
    if settings.blob_s3_access_key_id and settings.blob_s3_secret_access_key:
        config["access_key_id"] = settings.blob_s3_access_key_id
        config["secret_access_key"] = settings.blob_s3_secret_access_key.get_secret_value()
    return BucketBlobStorage(
        match[1], (match[2] or "").strip("/"), config, allow_http=endpoint.startswith("http://")
    )
