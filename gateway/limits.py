"""Every limit on what a client may send, in one place; the documentation's table is made from this."""

from __future__ import annotations

from typing import Final

from engine.findings import MAX_FINDINGS

PAGE_DEFAULT: Final = 20
"""Items of a list, where `limit` says nothing."""
PAGE_MAX: Final = 100
"""Items of a list at once."""
OFFSET_MAX: Final = 1_000_000
"""Items of a list that may be skipped."""
QUERY_FIELDS: Final = 50
"""Parameters in a query string."""
SEARCH_LENGTH: Final = 200
"""Characters of a search, or of any other text in a query."""

WORKFLOW_NAME_LENGTH: Final = 200
"""Characters of a workflow's name."""
DESCRIPTION_LENGTH: Final = 5_000
"""Characters of a description."""
VERSIONS: Final = 10_000
"""Versions of a workflow."""
VERSIONS_LISTED: Final = 1_000
"""Versions of a list at once, and where `limit` says nothing."""
VERSION_TAG_LENGTH: Final = 64
"""Characters of a version's tag."""
SHARES: Final = 1_000
"""Users that a workflow is shared with."""
TAGS: Final = 50
"""Tags of a workflow."""
TAG_LENGTH: Final = 64
"""Characters of a tag."""
NODES: Final = 10_000
"""Nodes of a graph."""
CONNECTIONS: Final = 20_000
"""Connections of a graph."""
REMOVED_SECRETS: Final = 1_000
"""Credentials that an answer names of those that were left out of a copy."""
GRAPH_BYTES: Final = 10_000_000
"""Bytes of a graph's nodes as JSON, up to which it grows piece by piece."""
NODE_TYPE_LENGTH: Final = 64
"""Characters of a node's type, and of its version."""
LABEL_LENGTH: Final = 200
"""Characters of a node's label, and of a port's name."""
FINDINGS: Final = 100
"""Wrong fields, or findings of a validation, that a refusal lists."""
VALIDATION_FINDINGS: Final = MAX_FINDINGS
"""Errors, and warnings, that the answer of a validation lists."""
SETTINGS_BYTES: Final = 20_000
"""Bytes of a workflow's settings as JSON."""
TIMEOUT_SECONDS: Final = 604_800
"""Seconds that a run, or one of its nodes, may be given: a week."""
PARALLELISM: Final = 64
"""Nodes of one run that wait for something outside at once, where its settings allow the most."""
RETRIES: Final = 10
"""Repetitions of a failed run, and attempts at a failed node."""
RETRY_DELAY_SECONDS: Final = 86_400
"""Seconds between two attempts at a node."""

KEY_NAME_LENGTH: Final = 100
"""Characters of a key's name."""
KEY_LIFETIME_SECONDS: Final = 315_360_000
"""Seconds until a key expires, where it does: ten years."""
USER_NAME_LENGTH: Final = 200
"""Characters of a user's name."""
EMAIL_LENGTH: Final = 254
"""Characters of an e-mail address."""
IDEMPOTENCY_KEY_LENGTH: Final = 255
"""Characters of an Idempotency-Key, each a visible ASCII character."""
IDEMPOTENCY_SECONDS: Final = 86_400
"""Seconds for which a repeated request gets the first answer again: a day."""

ACCEPTANCES_WAITING: Final = 2_000
"""Executions that wait at one gateway to be committed; more get 503."""
WAIT_SECONDS: Final = 30
"""Seconds that a poll may wait for the end of an execution."""
WAIT_DEFAULT_SECONDS: Final = 9
"""Seconds that a poll waits for the end of an execution, where `wait` says nothing."""
POLLS_WAITING: Final = 10_000
"""Polls that wait at one gateway; more get 503."""
EVENT_STREAMS: Final = 500
"""Event streams open at one gateway; more get 503."""
RECORDS_DEFAULT: Final = 100
"""Spans or log lines of a list, where `limit` says nothing."""
RECORDS_MAX: Final = 1_000
"""Spans or log lines of a list at once."""
