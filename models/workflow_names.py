"""Kubernetes names of a workflow's objects, made from its id: valid as Deployment, Service and label value.

Names of Services are the most limited of these up to Kubernetes 1.35: RFC 1035, a letter first, 63
characters.
"""

from __future__ import annotations

import re
from hashlib import blake2b

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


def workflow_name(workflow_id: str) -> str:
    """Return the unique name of a workflow: two ids never share one.

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
    """Return the generated id from which a name was made, or None."""
    if not name.startswith(_OWN_PREFIX):
        return None
    found = "wf_" + name.removeprefix(_OWN_PREFIX)
    return found if _OWN_ID.match(found) else None


def pods_service_name(workflow_id: str) -> str:
    """Return the name of the headless Service of a workflow's pods."""
    return workflow_name(workflow_id) + PODS_SUFFIX


def _encode_base32(digest: bytes) -> str:
    number = int.from_bytes(digest, "big")
    return "".join(ids.ALPHABET[number >> 5 * place & 31] for place in reversed(range(_DIGEST_CHARACTERS)))
