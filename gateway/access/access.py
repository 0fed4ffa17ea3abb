"""API keys and users of an organization, and the identity of a key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, ClassVar, Final

from msgspec import UNSET, Meta, UnsetType
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.access import audit_log
from gateway.http import errors, limits, read_only, text_rules
from gateway.http.request import GatewayRequest
from gateway.http.responses import JsonResponse, NoContent
from gateway.http.text_rules import ProblemCollector
from gateway.http.wire import Instant, StrictWire, WireStruct, body_of, instant, optional_instant, read_json
from models import access_store, key_refusal
from models.access import (
    ALL_KEY_SCOPES,
    DEFAULT_SCOPES,
    SCOPES_OF_ROLES,
    ApiCaller,
    ApiKey,
    KeyScope,
    User,
    UserRole,
)
from models.audit import AuditAction
from models.key_refusal import RefusedScope

LIFETIME: Final = {"minimum": 1, "maximum": limits.KEY_LIFETIME_SECONDS}
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+\Z")


NodeTypePattern = Annotated[
    str,
    Meta(
        pattern=r"^[a-z][a-z0-9-]{1,38}/(\*|[a-z][a-z0-9-]{1,62})$",
        description=(
            "a custom node type such as acme/resize, or a namespace such as acme/*, with names of 2 to 39 and 2 to 63"
            " lower-case letters, digits and hyphens, a letter first"
        ),
    ),
]


class CreateKey(StrictWire):
    """Request body that creates an API key."""

    read_only: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            *("id", "prefix", "createdAt", "revokedAt", "lastUsedAt", "lastRoute", "lastAddressHash"),
            *("refusals", "key", "warnings"),
        ),
        "",
    )

    name: Annotated[str, text_rules.describe_length(limits.KEY_NAME_LENGTH, min_length=1)]
    scopes: list[KeyScope] | None = None
    """Scopes of the new key, at most those of the requesting key; by default exactly those without `tasks:work`, which
    only an admin gives: the key performs tasks of the executions that its user may see, of an admin all.
    """
    node_types: Annotated[list[NodeTypePattern], Meta(max_length=100)] | None = None
    """Custom node types whose tasks the key performs: names, or namespaces such as `acme/*`. By default all."""
    expires_at: datetime | None = None
    expires_in_seconds: Annotated[int, Meta(extra_json_schema=LIFETIME)] | None = None
    """Alternative to `expiresAt`; with neither, the key never expires."""
    user_id: str | None = None
    """Owner of the new key; only an admin may name another user."""


class CreateUser(StrictWire):
    """Request body with which an admin creates a user."""

    read_only: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("id", "organizationId", "createdAt", "warnings"), ""
    )

    email: Annotated[str, text_rules.describe_length(limits.EMAIL_LENGTH, min_length=3)]
    name: Annotated[str, text_rules.describe_length(limits.USER_NAME_LENGTH)] = ""
    role: UserRole = UserRole.MEMBER


class KeyRefusalShape(WireStruct):
    """Requests of a key that were refused for want of one scope in the last seven days."""

    scope: KeyScope
    count: int
    last_at: Instant
    last_route: str
    """Method and path template of the last one."""


class KeyShape(WireStruct):
    """API key as the API shows it: without its secret, except in the answer that creates it."""

    id: str
    name: str
    prefix: str
    scopes: Sequence[KeyScope]
    node_types: Sequence[str] | None
    """Custom node types whose tasks it performs; null: all."""
    user_id: str
    created_at: Instant
    expires_at: Instant | None
    revoked_at: Instant | None
    last_used_at: Instant | None
    """Last use, exact to a minute."""
    last_route: str | None
    """Method and path template of that request, such as `POST /api/v1/workflows/{id}/execute`."""
    last_address_hash: str | None
    """Keyed hash of the address that it came from: equal addresses have equal hashes."""
    refusals: Sequence[KeyRefusalShape]
    """Scopes that it lacked in the last seven days, the most frequent first. Requests of browser sessions do not count.
    """
    key: str | UnsetType = UNSET
    """Secret key text, only in the answer that creates the key."""


class UserShape(WireStruct):
    """User as the API shows it."""

    id: str
    email: str
    name: str
    role: UserRole
    organization_id: str
    created_at: Instant


class WhoAmI(WireStruct):
    """User, organization and scopes of the requesting key."""

    user_id: str
    email: str
    name: str
    role: UserRole
    organization_id: str
    organization_name: str
    key_id: str
    scopes: Sequence[KeyScope]


class KeyList(WireStruct):
    """Page of a list of keys; `count` is the number of all keys."""

    count: int
    limit: int
    offset: int
    keys: Sequence[KeyShape]


class UserList(WireStruct):
    """Page of a list of users; `count` is the number of all users."""

    count: int
    limit: int
    offset: int
    users: Sequence[UserShape]


async def whoami(request: GatewayRequest) -> JsonResponse:
    """Return the user, organization and scopes of the requesting key."""
    caller = request.caller
    async with request.gateway.database.read() as connection:
        user = await access_store.find_user(connection, caller.organization_id, caller.user_id)
        organization = await access_store.find_organization(connection, caller.organization_id)
    if user is None or organization is None:
        raise errors.unauthorized()
    return JsonResponse(
        WhoAmI(
            user_id=user.id,
            email=user.email,
            name=user.name,
            role=UserRole(user.role),
            organization_id=organization.id,
            organization_name=organization.name,
            key_id=caller.key_id,
            scopes=_list_known_scopes(caller.scopes),
        )
    )


# ── keys ────────────────────────────────────────────────────────────────────────────────────────────────────


async def list_keys(request: GatewayRequest) -> JsonResponse:
    """List the caller's own keys; for an admin, the keys of the organization."""
    caller = request.caller
    page = request.query.page()
    async with request.gateway.database.read() as connection:
        count, keys = await access_store.list_keys(
            connection,
            caller.organization_id,
            user_id=_restrict_to_own_keys(caller),
            limit=page.limit,
            offset=page.offset,
        )
        refused = await key_refusal.list_by_key(connection, [key.id for key in keys], request.gateway.clock())
    shown = [_key_shape(key, refused.get(key.id, ())) for key in keys]
    return JsonResponse(KeyList(count=count, limit=page.limit, offset=page.offset, keys=shown))


async def create_key(request: GatewayRequest) -> JsonResponse:
    """Create an API key for yourself or, as an admin, for a user of the organization.

    It has at most your own scopes and those of the user's role. Only an admin gives `tasks:work`. Only this answer
    contains the secret key.
    """
    value = await read_json(request)
    body = body_of(request, value, CreateKey)
    read_only.warn_of_new(request, value, CreateKey, dict)
    caller = request.caller
    now = request.gateway.clock()
    problems = ProblemCollector()
    name = text_rules.check_line(body.name, "name", problems, max_length=limits.KEY_NAME_LENGTH)
    expires_at = _read_expiry(body, now, problems)
    problems.raise_any()
    scopes = frozenset(caller.scopes - {KeyScope.TASKS_WORK} if body.scopes is None else body.scopes)
    if beyond := sorted(scopes - _list_givable_scopes(caller)):
        raise errors.scope_required(beyond[0])
    user_id = body.user_id or caller.user_id
    if user_id != caller.user_id and not caller.is_admin:
        raise errors.not_found("user")

    async def make(connection: AsyncConnection) -> access_store.CreatedKey:
        user = await access_store.find_user(connection, caller.organization_id, user_id)
        if user is None:
            raise errors.not_found("user")
        _require_scopes_of_role(body, UserRole(user.role))
        made = await access_store.create_key(
            connection,
            user=user,
            name=name,
            scopes=scopes & SCOPES_OF_ROLES[UserRole(user.role)],
            secret=request.gateway.settings.secret,
            now=now,
            expires_at=expires_at,
            node_types=_node_types(caller, body.node_types),
        )
        after = audit_log.hash_content(made.row)
        given = {
            "name": name,
            "userId": user_id,
            "scopes": sorted(made.row.scopes),
            "expiresAt": None if expires_at is None else instant(expires_at),
        }
        await audit_log.record_change(
            connection,
            caller,
            AuditAction.KEY_CREATED,
            made.row.id,
            before=None,
            after=after,
            changes=audit_log.list_changes({}, given, shown=given.keys()),
        )
        return made

    made = await request.gateway.database.transaction(make)
    return JsonResponse(_key_shape(made.row, key_text=made.key), status=201)


async def revoke_key(request: GatewayRequest) -> NoContent:
    """Revoke an API key; it stops working within a second.

    You may revoke your own keys, and an admin those of the organization.
    """
    caller, key_id = request.caller, request.path_params["id"]

    async def revoke(connection: AsyncConnection) -> None:
        now, user_id = request.gateway.clock(), _restrict_to_own_keys(caller)
        revoked = await access_store.revoke_key(
            connection, caller.organization_id, key_id, user_id=user_id, now=now
        )
        if revoked is None:
            raise errors.not_found("key")
        await audit_log.record_change(
            connection,
            caller,
            AuditAction.KEY_REVOKED,
            key_id,
            before=audit_log.hash_content(revoked.before),
            after=audit_log.hash_content(revoked.after),
        )

    await request.gateway.database.transaction(revoke)
    return NoContent()


def _list_givable_scopes(caller: ApiCaller) -> frozenset[str]:
    """Return the scopes that a caller may give to a key: its own, but `tasks:work` only as an admin, who needs all
    other scopes for it unless its key has it.
    """
    if not caller.is_admin:
        return caller.scopes - {KeyScope.TASKS_WORK}
    is_full = caller.scopes >= DEFAULT_SCOPES[caller.role]
    return caller.scopes | {KeyScope.TASKS_WORK} if is_full else caller.scopes


def _node_types(caller: ApiCaller, wanted: Sequence[str] | None) -> Sequence[str] | None:
    """Return the node types of a new key: the wanted ones; if None, those of the requesting key (None: all).

    Raises a 403 error for a wanted type that the requesting key may not perform, by its name or by
    `package/*`.
    """
    allowed = caller.node_types
    if allowed is None:
        return wanted
    if wanted is None:
        return allowed
    beyond = [one for one in wanted if not {one, f"{one.partition('/')[0]}/*"} & set(allowed)]
    if beyond:
        raise errors.ApiError(
            403, "node-type-not-allowed", f"The key performs only {', '.join(allowed)}, not {beyond[0]}"
        )
    return wanted


def _list_known_scopes(scopes: Iterable[str]) -> list[KeyScope]:
    """Return the stored scopes that this release has, sorted; others, stored by a newer release, are left out."""
    return sorted(KeyScope(scope) for scope in scopes if scope in ALL_KEY_SCOPES)


def _require_scopes_of_role(body: CreateKey, role: UserRole) -> None:
    """Raise a 422 error for requested scopes that keys of a role can't have."""
    if beyond := sorted(frozenset(body.scopes or ()) - SCOPES_OF_ROLES[role]):
        message = f"A {role} cannot have {', '.join(beyond)}: leave it out, or choose another user"
        raise errors.invalid([errors.problem("scopes", "beyond-role", message)])


def _restrict_to_own_keys(caller: ApiCaller) -> str | None:
    """Return the id of the owner of the keys that a caller may manage, that is, its own.

    None for an admin, who manages all of the organization.
    """
    return None if caller.is_admin else caller.user_id


def _read_expiry(body: CreateKey, now: datetime, problems: ProblemCollector) -> datetime | None:
    """Return the expiry of a new key from the request; None for a key that does not expire.

    Adds a problem to `problems` for an invalid one.
    """
    if body.expires_at is not None and body.expires_in_seconds is not None:
        problems.add("expiresAt", "conflict", "Give expiresAt or expiresInSeconds, not both")
        return None
    latest = now + timedelta(seconds=limits.KEY_LIFETIME_SECONDS)
    if body.expires_in_seconds is not None:
        if not 1 <= body.expires_in_seconds <= limits.KEY_LIFETIME_SECONDS:
            allowed = f"expiresInSeconds must be from 1 to {limits.KEY_LIFETIME_SECONDS:,}"
            problems.add("expiresInSeconds", "out-of-range", allowed)
            return None
        return now + timedelta(seconds=body.expires_in_seconds)
    if body.expires_at is None:
        return None
    moment = body.expires_at if body.expires_at.tzinfo else body.expires_at.replace(tzinfo=UTC)
    if not now < moment <= latest:
        problems.add("expiresAt", "out-of-range", f"expiresAt must be between now and {instant(latest)}")
        return None
    return moment.astimezone(UTC)


def _key_shape(
    key: ApiKey, refused: Sequence[RefusedScope] = (), *, key_text: str | UnsetType = UNSET
) -> KeyShape:
    """Return a key as the API shows it, with its secret text only if `key_text` is given.

    `refused` counts the requests that were refused because the key lacked a scope.
    """
    return KeyShape(
        key=key_text,
        id=key.id,
        name=key.name,
        prefix=key.prefix,
        scopes=_list_known_scopes(key.scopes),
        node_types=key.node_types,
        user_id=key.user_id,
        created_at=instant(key.created_at),
        expires_at=optional_instant(key.expires_at),
        revoked_at=optional_instant(key.revoked_at),
        last_used_at=optional_instant(key.last_used_at),
        last_route=key.last_route,
        last_address_hash=key.last_address_hash,
        refusals=[
            KeyRefusalShape(
                scope=KeyScope(one.scope),
                count=one.count,
                last_at=instant(one.last_at),
                last_route=one.last_route,
            )
            for one in refused
            if one.scope in ALL_KEY_SCOPES
        ],
    )


# ── users ───────────────────────────────────────────────────────────────────────────────────────────────────


async def list_users(request: GatewayRequest) -> JsonResponse:
    """List the users of the organization."""
    page = request.query.page()
    async with request.gateway.database.read() as connection:
        count, users = await access_store.list_users(
            connection, request.caller.organization_id, limit=page.limit, offset=page.offset
        )
    shown = [_user_shape(user) for user in users]
    return JsonResponse(UserList(count=count, limit=page.limit, offset=page.offset, users=shown))


async def create_user(request: GatewayRequest) -> JsonResponse:
    """Create a user of the organization; the scopes of its keys define its permissions.

    Refused if the organization has a user with the e-mail address.
    """
    value = await read_json(request)
    body = body_of(request, value, CreateUser)
    read_only.warn_of_new(request, value, CreateUser, dict)
    problems = ProblemCollector()
    email = text_rules.check_line(body.email, "email", problems, max_length=limits.EMAIL_LENGTH)
    if email and not _EMAIL.match(email):
        problems.add("email", "invalid-value", "email must be an address such as ada@example.com")
    name = text_rules.check_line(
        body.name, "name", problems, max_length=limits.USER_NAME_LENGTH, may_be_empty=True
    )
    problems.raise_any()

    async def make(connection: AsyncConnection) -> User:
        organization = await access_store.find_organization(connection, request.caller.organization_id)
        if organization is None:
            raise errors.unauthorized()
        user = await access_store.create_user(
            connection,
            organization=organization,
            email=email,
            name=name,
            role=body.role,
            now=request.gateway.clock(),
        )
        after = audit_log.hash_content(user)
        await audit_log.record_change(
            connection, request.caller, AuditAction.USER_CREATED, user.id, before=None, after=after
        )
        return user

    try:
        user = await request.gateway.database.transaction(make)
    except access_store.EmailTaken as error:
        raise errors.conflict("email-taken", str(error)) from error
    return JsonResponse(_user_shape(user), status=201)


def _user_shape(user: User) -> UserShape:
    return UserShape(
        id=user.id,
        email=user.email,
        name=user.name,
        role=UserRole(user.role),
        organization_id=user.organization_id,
        created_at=instant(user.created_at),
    )
