"""Every limit on what a client may send, in one place; the documentation's table is made from this."""

from __future__ import annotations

from typing import Final

from engine.findings import MAX_FINDINGS
from journal import admission
from models import data_source_types
from senders import event as sender_events

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

DISCOVERED: Final = 1_000
"""Workflows of an application that are listed."""
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
"""Users that a workflow, or a data source, is shared with."""
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

WINDOWS: Final = 50
"""Windows of a lifecycle policy's schedule."""
TIMEZONE_LENGTH: Final = 64
"""Characters of the name of a schedule's zone."""
POD_MILLICORES: Final = 8_000
"""Thousandths of a processor that a workflow may ask for in each of its pods."""
POD_MEBIBYTES: Final = 16_384
"""MiB of memory that a workflow may ask for in each of its pods."""
POD_LOG_LINES: Final = 1_000
"""Lines of its pods' own log that are shown of a workflow at once."""
PREVIEW_RUNS: Final = 10_000
"""Past runs, the last ones, that the preview of a lifecycle policy is made for."""

DATA_SOURCES: Final = 1_000
"""Data sources of an organisation."""
DATA_SOURCE_NAME_LENGTH: Final = 200
"""Characters of a data source's name."""
DATA_SOURCE_HOSTS: Final = data_source_types.MAX_HOSTS
"""Hosts that the secrets of a data source are meant for, where it names them."""
SECRET_LENGTH: Final = data_source_types.MAX_SECRET_LENGTH
"""Characters of a secret of a data source."""
DATA_SOURCE_TEST_SECONDS: Final = 10
"""Seconds that the test of a data source may take."""
DATA_SOURCE_TESTS: Final = 30
"""Tests of data sources that an organisation may make within a minute at one gateway; more get 429."""

BULK_EXECUTIONS: Final = 1_000
"""Executions that one request cancels, retries or deletes by a filter."""
BULK_LISTED: Final = 100
"""Ids of such executions that the answer lists."""

CALLBACK_URL_LENGTH: Final = 2_000
"""Characters of an address that is told of the end of a run."""
CONCURRENT_RUNS: Final = admission.MAX_LIMIT
"""Runs at once, where the settings of a workflow limit them."""
CONCURRENCY_KEY_LENGTH: Final = 500
"""Characters of the expression for whose values such a limit counts apart."""

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

LOWEST_PRIORITY: Final = -100
HIGHEST_PRIORITY: Final = 100
"""Steps by which a message counts as older or younger than it is: a minute each."""
SOURCE_LENGTH: Final = 200
"""Characters of the label that says where a message or an event comes from."""
EVENT_TYPE_LENGTH: Final = sender_events.MAX_TYPE_LENGTH
"""Characters of the type of an event."""
EVENT_TOKEN_SECRETS: Final = 5
"""Secrets of one provider that a token for events holds."""
EVENT_FAN_OUT_BYTES: Final = 50_000_000
"""Bytes that all runs of one event are given together, as JSON; a larger one is refused."""
DELAY_SECONDS: Final = 31_536_000
"""Seconds by which a message may be delayed: a year."""
TOKEN_OVERLAP_SECONDS: Final = 604_800
"""Seconds for which a trigger token may stay good after it was replaced: a week."""
TRIGGER_TOKENS: Final = 10
"""Trigger tokens of a workflow that are good at once, while replaced ones go on: the oldest end first."""
KEPT_REFUSED_CHARACTERS: Final = 1_000_000
"""Characters of something refused that is kept, so that it can be run once more."""
REDRIVEN_AT_ONCE: Final = 1_000
"""Deliveries or dead letters that are run once more, or purged, by one request."""
BATCH_MESSAGES: Final = 1_000
"""Messages that are enqueued by one request."""
DEDUPLICATION_ID_LENGTH: Final = 255
"""Characters of the name by which a message that is sent twice is known."""

UNVERIFIED_HOOK_REQUESTS: Final = 5
"""Requests a second to a webhook that takes what anybody sends."""
UNVERIFIED_HOOK_BURST: Final = 20
"""Requests to such a webhook at once."""

ACCEPTANCES_WAITING: Final = 2_000
"""Executions that wait at one gateway to be committed; more get 503."""
TRIGGER_SYNC_SECONDS: Final = 300
"""Seconds that a synchronous trigger waits for the end of its run, the start of a pod included."""
TRIGGER_ASYNC_SECONDS: Final = 30
"""Seconds that an asynchronous trigger waits for a pod to take its run, its start included."""
WAKES_WAITING: Final = 1_000
"""Triggers that wait at one gateway for one deployment to start; more get 503."""
EXPANDED_BYTES: Final = 10_000_000
"""Bytes of outputs kept as blobs that one answer shows with `?expand=blobs`; others stay explained."""
TRIGGER_OUTPUT_CHARACTERS: Final = 20_000_000
"""Characters of the outputs that a synchronous trigger answers with, as JSON; the execution has larger ones."""
TRIGGER_TYPE_LENGTH: Final = 64
"""Characters of the label that says what has triggered a run."""
WAIT_SECONDS: Final = 30
"""Seconds that a poll may wait for the end of an execution."""
WAIT_DEFAULT_SECONDS: Final = 9
"""Seconds that a poll waits for the end of an execution, where `wait` says nothing."""
PINNED_BYTES: Final = 1_000_000
"""Bytes, as JSON, of the outputs that are given to a run for nodes that it doesn't run."""
TEST_WAIT_DEFAULT_SECONDS: Final = 10
"""Seconds that the test of a node waits for its end, where `wait` says nothing."""
POLLS_WAITING: Final = 10_000
"""Polls that wait at one gateway; more get 503."""
EVENT_STREAMS: Final = 500
"""Event streams open at one gateway; more get 503."""
RECORDS_DEFAULT: Final = 100
"""Spans or log lines of a list, where `limit` says nothing."""
RECORDS_MAX: Final = 1_000
"""Spans or log lines of a list at once."""
