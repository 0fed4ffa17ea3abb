"""Identity of a deployed workflow's pods: names of its objects in Kubernetes and of processes in leases, and tokens.

Names of objects are made from the id of the workflow and valid as Deployment, Service and label value. Those of
Services are the most limited up to Kubernetes 1.35: RFC 1035, a letter first, 63 characters. A process has the name
`pod:<workflow>:<pod>/<start>`, since a pod may restart under its name, and nobody renews the leases of its earlier
process.

With tokens, pods and the gateway authenticate each other. A token is derived from the server's secret and a row's id.
So the deployer can derive it again, and nobody stores it. Rows store its hash. The gateway authenticates to pods with a
key that is derived from this hash, so that it never sends the token itself.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Final

from msgspec import Struct

from models import ids

MAX_LENGTH = 63
PREFIX = "workflow-"
PODS_SUFFIX = "-pods"
_OWN_ID = re.compile(rf"wf_[{ids.ALPHABET}]{{26}}\Z")
_OWN_PREFIX = PREFIX + "wf-"
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]+")
_DIGEST_BYTES = 10
_DIGEST_CHARACTERS = 16
_MAX_NAME_LENGTH = MAX_LENGTH - len(PODS_SUFFIX)

POD_OWNER_PREFIX: Final = "pod:"
"""Prefix of the lease owner names of all pods."""
_NAME: Final = re.compile(r"(?P<pod>[A-Za-z0-9_-]{1,64})/(?P<milliseconds>[0-9]{13})")


_BEGIN_OF_TOKENS: Final = "rt-" + "00"
"""Prefix, and a code that is reserved for routing between regions."""
_TOKEN_CHARACTERS: Final = 52


def workflow_name(workflow_id: str) -> str:
    """Return the unique name of a workflow's objects in Kubernetes, at most 58 characters: two ids never share one.

    Generated ids keep their characters. Names of other ids end in a digest, since `wf_A` and `wf-a` would
    collide otherwise. The digest is shorter than the last part of a generated id, so no name is ambiguous.
    """
    if _OWN_ID.match(workflow_id):
        return PREFIX + workflow_id.replace("_", "-")
    digest = blake2b(workflow_id.encode(), digest_size=_DIGEST_BYTES).digest()
    ending = "-" + _encode_base32(digest)
    readable = _NOT_IN_NAMES.sub("-", workflow_id.lower()).strip("-")
    room = _MAX_NAME_LENGTH - len(PREFIX) - len(ending)
    return (PREFIX + readable[:room]).rstrip("-") + ending


def parse_workflow_id(name: str) -> str | None:
    """Return the generated workflow id in a name of `workflow_name`; None for the name of another id or object."""
    if not name.startswith(_OWN_PREFIX):
        return None
    found = "wf_" + name.removeprefix(_OWN_PREFIX)
    return found if _OWN_ID.match(found) else None


def pods_service_name(workflow_id: str) -> str:
    """Return the name of the headless Service of a workflow's pods."""
    return workflow_name(workflow_id) + PODS_SUFFIX


def _encode_base32(digest: bytes) -> str:
    """Return a digest of 10 bytes as 16 characters that names in Kubernetes may have."""
    number = int.from_bytes(digest, "big")
    return "".join(ids.ALPHABET[number >> 5 * place & 31] for place in reversed(range(_DIGEST_CHARACTERS)))


class PodProcess(Struct, frozen=True):
    """One process of a pod."""

    pod: str
    started_at: datetime
    """Start time by the clock of its machine, in whole milliseconds."""

    @classmethod
    def new(cls, pod: str) -> PodProcess:
        """Return the identity of a process of this pod that starts now, to the millisecond."""
        return cls(pod, datetime.fromtimestamp(int(datetime.now(UTC).timestamp() * 1_000) / 1_000, UTC))  # noqa: TID251 - compared on one machine

    @classmethod
    def from_name(cls, name: str) -> PodProcess | None:
        """Parse a process from its name, `pod/milliseconds`; None for any other text."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        return cls(found["pod"], datetime.fromtimestamp(int(found["milliseconds"]) / 1_000, UTC))

    @property
    def name(self) -> str:
        """Name of the process: its pod, a slash, and its start in milliseconds since 1970 with 13 digits."""
        return f"{self.pod}/{round(self.started_at.timestamp() * 1_000):013d}"


def lease_owner(workflow_id: str, process: PodProcess) -> str:
    """Return the lease owner name of a pod's process, under which it claims runs of its workflow.

    It begins with `lease_owner_prefix`, as only names of pods of this workflow do.
    """
    return f"{lease_owner_prefix(workflow_id)}{process.name}"


def lease_owner_prefix(workflow_id: str) -> str:
    """Return the beginning that the lease owner names of all pods of a workflow share."""
    return f"{POD_OWNER_PREFIX}{workflow_id}:"


def derive_token(token_id: str, secret: bytes) -> str:
    """Return the token of a pod, always the same for the id of its row and the server secret: `rt-`, a constant routing
    code of two characters, and 260 bits.
    """
    key = blake2b(secret, digest_size=64, person=b"runner tokens").digest()
    number = int.from_bytes(blake2b(token_id.encode(), key=key, digest_size=33).digest(), "big")
    digits = "".join(ids.ALPHABET[number >> 5 * place & 31] for place in range(_TOKEN_CHARACTERS))
    return _BEGIN_OF_TOKENS + digits


def hash_token(token: str) -> str:
    """Return the stored hash of a token, unkeyed, since a token has too many random bits to be guessed."""
    return blake2b(token.encode(), digest_size=32, person=b"runner token").hexdigest()


def wakeup_key(hashed: str) -> str:
    """Return the key that authenticates wakeups of a pod, derived from the stored hash of its token."""
    return blake2b(hashed.encode(), digest_size=32, person=b"runner wakeups").hexdigest()
