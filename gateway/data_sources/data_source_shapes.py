"""Data sources in requests and answers: fields become a row, and answers omit the secrets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias, TypeVar

from msgspec import Meta, field

from gateway.http import limits, text_rules
from gateway.http.errors import ApiError
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import Instant, StrictWire, WireStruct, convert, instant
from models import data_source_types, ids
from models.data_source import DataSource, encrypt_secrets, fingerprint_secrets
from models.data_source_types import DATA_SOURCE_TYPES, DataSourceFields, DataSourceType, to_stored

if TYPE_CHECKING:
    from engine.values import Json
    from gateway.data_sources.data_source_rows import StoredDataSource
    from models.access import ApiCaller
    from models.encryption import SecretVault

Given = TypeVar("Given", bound=DataSourceFields)

Name: TypeAlias = Annotated[str, text_rules.describe_length(limits.DATA_SOURCE_NAME_LENGTH, min_length=1)]
Settings: TypeAlias = Annotated[
    dict[str, Any],
    Meta(
        description=(
            f"Fields of the type; `?` marks optional ones. {data_source_types.describe_fields('settings')}."
        )
    ),
]
Secrets: TypeAlias = Annotated[
    dict[str, Any],
    Meta(description=f"Stored encrypted and never shown. {data_source_types.describe_fields('secrets')}."),
]


class CreateDataSource(StrictWire):
    """Data source to create."""

    read_only: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            (
                *("id", "secretNames", "secretsSetAt", "secretsFingerprint", "organizationId"),
                *("ownerId", "createdAt", "updatedAt"),
            ),
            "",
        ),
        "isPublic": "PUT /api/v1/datasources/:id/visibility",
        "sharedWith": "POST /api/v1/datasources/:id/share",
    }

    name: Name
    """Unique among the caller's data sources."""
    type: DataSourceType
    settings: Settings = field(default_factory=dict)
    secrets: Secrets = field(default_factory=dict)


class UpdateDataSource(StrictWire):
    """Changes of a data source; absent fields do not change."""

    read_only: ClassVar[Mapping[str, str]] = {**CreateDataSource.read_only, "type": ""}

    name: Name | None = None
    settings: Settings | None = None
    """Merged: null removes a setting. A change of the destination of the secrets requires `secrets` too."""
    secrets: Secrets | None = None
    """Replaces all secrets."""


class DataSourceShape(WireStruct):
    """Data source without its secrets."""

    id: str
    name: str
    type: DataSourceType
    settings: Mapping[str, Any]
    secret_names: Sequence[str]
    """Names of its secrets."""
    secrets_set_at: Instant
    secrets_fingerprint: str | None
    """Keyed hash of the secrets and the time at which they were set, so that it tells nothing of them; null without
    secrets, and for those that this server can't decrypt.
    """
    organization_id: str
    owner_id: str
    is_public: bool
    shared_with: Sequence[str]
    """Ids of the users that it is shared with."""
    created_at: Instant
    updated_at: Instant


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────


def build_data_source(
    caller: ApiCaller, body: CreateDataSource, vault: SecretVault, now: datetime
) -> DataSource:
    """Return a new data source of the caller with encrypted secrets, not stored yet.

    Raises a 422 error with all invalid fields, and for a user name without a password or the reverse.
    """
    problems = ProblemCollector()
    name = text_rules.check_line(body.name, "name", problems, max_length=limits.DATA_SOURCE_NAME_LENGTH)
    definition = DATA_SOURCE_TYPES[body.type]
    settings = _check_fields(body.settings, definition.settings, "settings", problems)
    secrets = _check_fields(body.secrets, definition.secrets, "secrets", problems)
    _check_login(settings, secrets, problems)
    problems.raise_any()
    source_id = ids.new_id("ds")
    kept = encrypt_secrets(vault, secrets, organization_id=caller.organization_id, source_id=source_id)
    return DataSource(
        id=source_id,
        organization_id=caller.organization_id,
        shard=caller.shard,
        owner_id=caller.user_id,
        name=name,
        type=body.type,
        settings=settings,
        secret_names=sorted(secrets),
        encrypted=kept.content,
        secret_id=kept.secret_id,
        secrets_set_at=now,
        created_at=now,
        updated_at=now,
    )


def apply_changes(
    before: StoredDataSource, body: UpdateDataSource, vault: SecretVault, now: datetime
) -> StoredDataSource:
    """Return a data source with the changes of a body, not stored yet; absent fields stay, a setting of null is
    removed, and secrets replace all earlier ones.

    If the destination of the secrets changes, such as the host, the secrets must be sent again, and accepted tools are
    removed. Raises a 422 error with all invalid fields.
    """
    source, problems = before.source, ProblemCollector()
    definition = DATA_SOURCE_TYPES[DataSourceType(source.type)]
    changes: dict[str, object] = {}
    if body.name is not None:
        changes["name"] = text_rules.check_line(
            body.name, "name", problems, max_length=limits.DATA_SOURCE_NAME_LENGTH
        )
    if body.settings is not None:
        merged = {**source.settings, **body.settings}
        given = {name: value for name, value in merged.items() if value is not None}
        settings = _check_fields(given, definition.settings, "settings", problems)
        changes["settings"] = settings
        if any(settings.get(name) != source.settings.get(name) for name in definition.destination):
            # Tools were accepted of another server.
            changes["tools"] = None
        if body.secrets is None and source.secret_names:
            _require_same_destination(source, settings, definition.destination, problems)
    secrets = None
    if body.secrets is not None:
        secrets = _check_fields(body.secrets, definition.secrets, "secrets", problems)
    has_secrets = dict.fromkeys(source.secret_names, "") if secrets is None else secrets
    _check_login(changes.get("settings", source.settings), has_secrets, problems)
    problems.raise_any()
    if secrets is not None:
        kept = encrypt_secrets(vault, secrets, organization_id=source.organization_id, source_id=source.id)
        changes |= {
            "secret_names": sorted(secrets),
            "encrypted": kept.content,
            "secret_id": kept.secret_id,
            "secrets_set_at": now,
        }
    return before.with_columns(**changes)


def _check_fields(
    given: Mapping[str, Json], kind: type[DataSourceFields], path: str, problems: ProblemCollector
) -> dict[str, object]:
    """Validate fields of a body by their type and return them as stored; if one is invalid, return {}.

    Invalid fields are added to `problems`, with their place below `path`.
    """
    try:
        return to_stored(convert(dict(given), kind, path))
    except ApiError as error:
        problems.found.extend(error.details)
        return {}


def _check_login(settings: object, secrets: Mapping[str, object], problems: ProblemCollector) -> None:
    """Add a problem for a `username` without a password, and for a password without `username` or `user`.

    Skipped if other problems were found.
    """
    if problems.found or not isinstance(settings, Mapping):
        return
    if "password" in secrets and not {"user", "username"} & settings.keys():
        problems.add("settings.username", "required", "settings.username is required with a password")
    if "username" in settings and "password" not in secrets:
        problems.add("secrets.password", "required", "secrets.password is required with a user name")


def _require_same_destination(
    source: DataSource,
    settings: Mapping[str, object],
    destination: frozenset[str],
    problems: ProblemCollector,
) -> None:
    """Add a problem if kept secrets would be sent to another destination than before.

    `destination` names the settings that form it, such as host and port.
    """
    for name in sorted(destination):
        if not problems.found and settings.get(name) != source.settings.get(name):
            message = f"secrets are required when settings.{name} changes: it is part of their destination"
            problems.add("secrets", "required", message)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────


def show_data_source(stored_source: StoredDataSource, vault: SecretVault) -> DataSourceShape:
    """Return a data source as the API shows it: with names and fingerprint of its secrets, but not their values."""
    source = stored_source.source
    return DataSourceShape(
        id=source.id,
        name=source.name,
        type=DataSourceType(source.type),
        settings=source.settings,
        secret_names=source.secret_names,
        secrets_set_at=instant(source.secrets_set_at),
        secrets_fingerprint=fingerprint_secrets(vault, source),
        organization_id=source.organization_id,
        owner_id=source.owner_id,
        is_public=source.is_public,
        shared_with=list(stored_source.shared_with),
        created_at=instant(source.created_at),
        updated_at=instant(source.updated_at),
    )
