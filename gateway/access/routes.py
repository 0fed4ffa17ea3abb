"""Routes for keys, users, signing secrets and the audit trail. Fixed paths precede `{id}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gateway.access import (
    access,
    audit,
    invitations,
    openid,
    session_shapes,
    sessions,
    sign_in,
    signing,
)
from gateway.http.endpoint import AccessRule
from gateway.http.operation_docs import OperationDoc
from gateway.http.parameters import LIMIT, OFFSET
from gateway.http.route import KEYS, Route

ROUTES: Final[Sequence[Route]] = (
    Route("GET", "/api/v1/auth/whoami", AccessRule.ANY_KEY, access.whoami, answer=access.WhoAmI),
    Route("GET", "/api/v1/auth/keys", KEYS, access.list_keys, query=(LIMIT, OFFSET), answer=access.KeyList),
    Route(
        "POST",
        "/api/v1/auth/keys",
        KEYS,
        access.create_key,
        body=access.CreateKey,
        answer=access.KeyShape,
        status=201,
        docs=OperationDoc(refusals=("not-found", "node-type-not-allowed")),
    ),
    Route(
        "GET", "/api/v1/auth/sessions", AccessRule.ANY_KEY, sessions.index, answer=session_shapes.SessionList
    ),
    Route(
        "GET",
        "/api/v1/auth/sessions/{id}",
        AccessRule.ANY_KEY,
        sessions.show,
        answer=session_shapes.SessionShape,
    ),
    Route("DELETE", "/api/v1/auth/sessions/{id}", AccessRule.ANY_KEY, sessions.end, status=204),
    Route("DELETE", "/api/v1/auth/keys/{id}", KEYS, access.revoke_key, status=204),
    Route(
        "GET",
        "/api/v1/auth/signing-secret",
        KEYS,
        signing.show,
        answer=signing.SigningSecretShape,
        docs=OperationDoc(refusals=("admin-required", "not-found")),
    ),
    Route(
        "POST",
        "/api/v1/auth/signing-secret",
        KEYS,
        signing.replace,
        answer=signing.NewSigningSecret,
        status=201,
        docs=OperationDoc(refusals=("admin-required",)),
    ),
    Route(
        "GET",
        "/api/v1/auth/users",
        AccessRule.ADMIN,
        access.list_users,
        query=(LIMIT, OFFSET),
        answer=access.UserList,
    ),
    Route(
        "POST",
        "/api/v1/auth/users",
        AccessRule.ADMIN,
        access.create_user,
        body=access.CreateUser,
        answer=access.UserShape,
        status=201,
        docs=OperationDoc(refusals=("email-taken",)),
    ),
    Route(
        "GET",
        "/api/v1/auth/invitations",
        AccessRule.ADMIN,
        invitations.index,
        query=(LIMIT, OFFSET),
        answer=invitations.InvitationList,
    ),
    Route(
        "POST",
        "/api/v1/auth/invitations",
        AccessRule.ADMIN,
        invitations.create,
        body=invitations.CreateInvitation,
        answer=invitations.InvitationShape,
        status=201,
    ),
    Route("DELETE", "/api/v1/auth/invitations/{id}", AccessRule.ADMIN, invitations.revoke, status=204),
    Route(
        "GET", "/api/v1/audit", AccessRule.ADMIN, audit.index, query=audit.LISTED, answer=audit.AuditEntryList
    ),
)

FOR_BROWSERS: Final[Sequence[Route]] = (
    Route("POST", "/session", AccessRule.PUBLIC, sign_in.create, status=201),
    Route("POST", "/invitation", AccessRule.PUBLIC, invitations.accept, status=201),
    Route("GET", "/session/openid", AccessRule.PUBLIC, openid.begin, status=302),
    Route("POST", "/session/openid", AccessRule.PUBLIC, openid.begin_invitation),
    Route("GET", openid.CALLBACK, AccessRule.PUBLIC, openid.finish, status=302),
    Route("DELETE", "/session", AccessRule.PUBLIC, sign_in.end, status=204),
)
"""Routes of sign-ins, for the pages of the dashboard."""
