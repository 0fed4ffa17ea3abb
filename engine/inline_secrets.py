"""Detection of credentials in configs, by field name or by shape.

A heuristic with few false positives: templates, paths and references to the environment are no credentials.
Its time is linear in the size of the value, for any content.
"""

from __future__ import annotations

import re
from enum import Enum
from functools import lru_cache
from typing import Final, TypeAlias

from engine.expressions import ROOTS
from engine.values import Json

MAX_PATHS: Final = 1_000
"""Maximum number of credentials whose places are returned; further ones are removed as well."""
MAX_NAME_LENGTH: Final = 100
"""Maximum length of a name that may denote a credential, and of a step of a path."""
SHORTEST_SHAPE: Final = 6
"""Length of the shortest text that matches a shape: `://:p@`."""


class _RemovedType(Enum):
    """Type of `_REMOVED`, which replaces a credential."""

    GONE = "gone"


_REMOVED: Final = _RemovedType.GONE
_Steps: TypeAlias = "list[str]"


def find_secrets(value: Json) -> list[str]:
    """Return the places of at most 1,000 credentials in a value, such as `headers.authorization` or `args.0`."""
    return remove_secrets(value)[1]


def remove_secrets(value: Json) -> tuple[Json, list[str]]:
    """Return a value without its credentials, and their places (at most 1,000), such as `headers.authorization`.

    Only texts are credentials. A field is removed with its name. In a list an empty text replaces a credential, so that
    the other items keep their positions; so it does for a value that is a credential itself. A text of several lines (a
    program, a message) loses only the credential, unless the field name marks all of it.
    """
    found: list[str] = []
    kept = _filter_value(value, "", [], found)
    return "" if kept is _REMOVED else kept, found


def _filter_value(value: Json, name: str, steps: _Steps, found: list[str]) -> Json | _RemovedType:
    """Return a value without credentials, or the marker for its removal; adds their places to `found`.

    `name` is the field name that applies to the value, and `steps` its path.
    """
    if isinstance(value, str):
        rest = _filter_text(value, name)
        if rest == value:
            return value
        if len(found) < MAX_PATHS:
            found.append(".".join(steps))
        return rest or _REMOVED
    if isinstance(value, list):
        items = [_filter_child(item, name, str(index), steps, found) for index, item in enumerate(value)]
        return ["" if item is _REMOVED else item for item in items]
    if isinstance(value, dict):
        fields = [
            (key, _filter_child(item, _field_name(key, value, name), key, steps, found))
            for key, item in value.items()
        ]
        return {key: item for key, item in fields if item is not _REMOVED}
    return value


def _filter_child(value: Json, name: str, step: str, steps: _Steps, found: list[str]) -> Json | _RemovedType:
    steps.append(step[:MAX_NAME_LENGTH])
    kept = _filter_value(value, name, steps, found)
    steps.pop()
    return kept


def _field_name(key: str, siblings: dict[str, Json], above: str) -> str:
    """Return the field name that tells whether the value of `key` is secret, which isn't always `key` itself.

    `siblings` is the object that has the key, and `above` the field name that applies to this object. Cases are
    `{"name": "Authorization", "value": "…"}`, `{"password": {"value": "…"}}` and values computed from literals:
    `{"token": {"$op": "concat", "args": ["…", "…"]}}`.
    """
    if key not in {"value", "values", "args"}:
        return key
    named = siblings.get("name") or siblings.get("key")
    return named if isinstance(named, str) else above


def _filter_text(text: str, name: str) -> str:
    """Return a text without credentials: unchanged if it has none, empty if it is one or a single line with one.

    A text under a secret name is one, unless it is a template or the name of a variable.
    """
    if _is_secret_name(name[: MAX_NAME_LENGTH + 1]) and _is_literal(text):
        return ""
    rest = _cut_secrets(text)
    if rest == text:
        return text
    # The rest of a single line is seldom useful, and two halves may form a credential again.
    return rest if "\n" in text and rest.strip() and _cut_secrets(rest) == rest else ""


# ── by name ─────────────────────────────────────────────────────────────────────────────────────────────────

_SECRET_NAMES: Final = frozenset({
    "adminpass", "dbpass", "dbpwd", "dsn", "ftppass", "pass", "pwd", "rootpass", "smtppass", "userpass",
})  # fmt: skip
_SECRET_ENDINGS: Final = (
    "accesskey", "accesstokens", "apikey", "apikeys", "authkey", "authorization", "clientkey", "connectionstring",
    "cookie", "encryptionkey", "masterkey", "passphrase", "passwd", "password", "passwords", "privatekey", "secret",
    "secretkey", "secrets", "sharedkey", "signingkey", "subscriptionkey", "token",
)  # fmt: skip
_OTHER_TOKENS: Final = (
    "bostoken", "continuationtoken", "cursortoken", "endtoken", "eostoken", "masktoken", "maxtoken", "nexttoken",
    "padtoken", "pagetoken", "septoken", "starttoken", "stoptoken", "synctoken", "unktoken",
)  # fmt: skip
"""Pagination tokens, and special tokens of language models."""
_SPELLING: Final = re.compile(r"[^a-z0-9]++")


@lru_cache(maxsize=4_096)
def _is_secret_name(name: str) -> bool:
    """Return whether a name denotes a credential, in any spelling: `apiKey`, `X-API-KEY`, `db_password2`."""
    if len(name) > MAX_NAME_LENGTH:
        return False
    plain = _SPELLING.sub("", name.lower()).rstrip("0123456789")
    return plain in _SECRET_NAMES or (plain.endswith(_SECRET_ENDINGS) and not plain.endswith(_OTHER_TOKENS))


_NO_LITERAL: Final = re.compile(
    rf"""
      (?: \$\. )?+ (?: {"|".join(ROOTS)} ) (?: \. [\w-]++ | \[ [^\[\]]*+ \] )*+
    | \$ \{{ [^{{}}]*+ \}} | \$ [A-Z_] [A-Z0-9_]*+ | % [A-Z_] [A-Z0-9_]*+ %
    | < [^<>]*+ > | [*•]++ | ds_[0-9a-z]{{1,40}}
    | (?i: none | null | true | false | basic | bearer | digest | oauth2? | api[_-]?key | header | query | body )
    """,
    re.VERBOSE,
)
"""Path, reference to the environment, id of a data source, placeholder of a hidden value, or authorization
scheme.
"""


_WRITTEN_FALLBACK: Final = re.compile(r"""\?\?\s*+"[^"\s]{8}""")
"""Fallback text of a path, long enough for a credential."""
_BRIEF_FALLBACK: Final = re.compile(r'-?[0-9.]{1,7}|"[^"]{0,7}"')


def _is_literal(text: str) -> bool:
    """Return whether a text may be a credential itself, as opposed to a reference to one.

    Empty texts, templates without a long fallback, and names of variables or vault entries are none.
    """
    stripped = text.strip()
    has_template = "{{" in stripped and "}}" in stripped and not _WRITTEN_FALLBACK.search(stripped)
    if stripped == "" or has_template:
        return False
    first, *fallbacks = map(str.strip, stripped.split("??"))
    return _NO_LITERAL.fullmatch(first) is None or not all(
        _NO_LITERAL.fullmatch(part) or _BRIEF_FALLBACK.fullmatch(part) for part in fallbacks
    )


# ── by shape ────────────────────────────────────────────────────────────────────────────────────────────────

# A text is searched for the patterns whose marker it contains. The patterns avoid repeated scans of the same
# characters: they begin at a boundary, repeat possessively, or repeat a limited number of times. Their first
# group is kept.
_BOUNDARY: Final = r"((?<![A-Za-z0-9_-]))"
_UP_TO_ITS_END: Final = r"(?:[^-]++|-(?!----END ))*+(?:-----END [A-Z0-9 ]{0,50}-----)?"
_SECRET_SHAPES: Final = [
    (marker, re.compile(pattern))
    for marker, pattern in (
        ("sk-", _BOUNDARY + r"sk-[\w-]{16,}+"),
        ("k_live_", _BOUNDARY + r"[sr]k_live_\w{10,}+"),
        ("k_test_", _BOUNDARY + r"[sr]k_test_\w{10,}+"),
        ("whsec_", _BOUNDARY + r"whsec_[\w+/=-]{16,}+"),
        ("akia", _BOUNDARY + r"AKIA[0-9A-Z]{16,}+"),
        ("asia", _BOUNDARY + r"ASIA[0-9A-Z]{16,}+"),
        ("gh", _BOUNDARY + r"gh[opsur]_[A-Za-z0-9]{20,}+"),
        ("github_pat_", _BOUNDARY + r"github_pat_\w{20,}+"),
        ("glpat-", _BOUNDARY + r"glpat-[\w-]{16,}+"),
        ("xox", _BOUNDARY + r"xox[abeoprs]-[\w-]{10,}+"),
        ("xapp-", _BOUNDARY + r"xapp-[\w-]{10,}+"),
        ("aiza", _BOUNDARY + r"AIza[\w-]{30,}+"),
        ("ya29.", _BOUNDARY + r"ya29\.[\w-]{20,}+"),
        ("sg.", _BOUNDARY + r"SG\.[\w-]{16,}+\.[\w-]{16,}+"),
        ("npm_", _BOUNDARY + r"npm_[A-Za-z0-9]{30,}+"),
        ("pypi-", _BOUNDARY + r"pypi-[\w-]{40,}+"),
        ("hf_", _BOUNDARY + r"hf_[A-Za-z0-9]{30,}+"),
        ("eyj", _BOUNDARY + r"eyJ[\w-]{5,}+\.eyJ[\w-]{5,}+\.[\w-]*+"),
        (
            "private key",
            r"()-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----" + _UP_TO_ITS_END,
        ),
        (
            "bearer",
            _BOUNDARY + r"(?i:bearer)[ \t]++"
            r"(?:(?=[A-Za-z._~+/=-]{0,200}[0-9])[\w.~+/=-]{8,}+|[\w.~+/=-]{24,}+)",
        ),
        (
            "basic",
            _BOUNDARY + r"(?i:basic)[ \t]++"
            r"(?=[A-Za-z0-9+/]{0,200}(?:[a-z][A-Z]|[0-9=]))[A-Za-z0-9+/]{8,}+={0,2}+",
        ),
        ("@", r"(://)(?!\{)[^\s/?#:@\"']*+:(?!\{|\$\{|<|\*)(?:[^\s/?#@\"']++@)++"),
        ("hooks.slack.com", r"(hooks\.slack\.com/[a-z]{1,20}/)[\w/-]{10,}+"),
        ("/api/webhooks/", r"(discord(?:app)?\.com/api/webhooks/)[\w/-]{10,}+"),
        ("webhook.office.com", r"(\.webhook\.office\.com/)[\w/@-]{10,}+"),
        ("accountkey", r"((?i:accountkey)[ ]?=[ ]?)[\w+/=-]{16,}+"),
    )
]
_NAMED_SECRETS: Final = [
    (marker, re.compile(pattern))
    for marker, pattern in (
        # password = "…", in a program or in JSON
        ('"', r'((?<![\w-])([\w-]{2,100}+)["\']?+[ \t]*+(?::|=>?)[ \t]*+")([^"\n]{4,400}+)(?=")'),
        ("'", r"((?<![\w-])([\w-]{2,100}+)[\"']?+[ \t]*+(?::|=>?)[ \t]*+')([^'\n]{4,400}+)(?=')"),
        # ?token=… in a URL, ;Password=… in a connection string
        ("=", r"([?&;][ ]?([\w-]{2,100}+)=)([^\s&;#\"'<>{}$()]{4,}+)(?![<>{}$(])"),
    )
]
"""Named credentials inside a text. Groups: text to keep, name, value."""


def _cut_secrets(text: str) -> str:
    """Return a text without credentials of a known shape, such as keys with the prefix of a provider, and without the
    values of secret names, as in `password="…"` or `?token=…`.
    """
    if len(text) < SHORTEST_SHAPE:
        return text
    rest, lowered = text, text.lower()
    for marker, pattern in _SECRET_SHAPES:
        if marker in lowered:
            rest = pattern.sub(r"\1", rest)
    for marker, pattern in _NAMED_SECRETS:
        if marker in rest:
            rest = pattern.sub(_cut_named_secret, rest)
    return rest


def _cut_named_secret(match: re.Match[str]) -> str:
    before, name, value = match.groups()
    return before if _is_secret_name(name) and _is_literal(value) else match[0]
