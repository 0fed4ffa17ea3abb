"""Limits of client requests, all in one place; the table of limits in the documentation is generated from
this module.
"""

from __future__ import annotations

from typing import Final

from engine.findings import MAX_FINDINGS
from journal import concurrency_limits, run_state
from journal.waits import signals
from models import data_source_types
from senders import sender_event as sender_events

PAGE_DEFAULT: Final = 20
"""Items of a list, unless `limit` is given."""
PAGE_MAX: Final = 100
"""Items of a list at once."""
OFFSET_MAX: Final = 1_000_000
"""Largest `offset` of a list."""
KEYSET_COUNT: Final = 10_000
"""Items that a list with `after` counts."""
METADATA_FILTERS: Final = 3
"""Keys of metadata that a list of executions is filtered by."""
EXECUTION_TAGS: Final = 20
"""Tags of an execution."""
EXECUTION_TAG_LENGTH: Final = 64
"""Characters of a tag of an execution."""
METADATA_KEYS: Final = 20
"""Keys of the metadata of an execution."""
PENDING_INPUTS: Final = 1_000
"""Questions in the list of those that a person may answer."""
EXAMINED_QUESTIONS: Final = 50_000
"""Waiting nodes of an organization that a list of its questions examines."""
QUESTIONS_OF_PAGE: Final = 500
"""Waiting nodes of an organization that a page of its questions by `after` examines."""
EXAMINED_RUNS: Final = 5_000
"""Executions that a list with `after` examines to count those that match."""
EXAMINED_FOR_PAGE: Final = 10_000
"""Executions, or deliveries, that a page of a list with `after` examines."""
EXAMINED_DEAD_LETTERS: Final = 2_000
"""Failed executions that a list of the dead letters of an organization examines."""
REDRIVE_COUNT: Final = 2_000
"""Deliveries of an organization that a redrive counts."""
EXAMINED_FOR_REDRIVE: Final = 100_000
"""Failed executions, or deliveries, that a redrive or purge for an organization examines, the oldest first."""
DEAD_LETTER_GROUPS: Final = 1_000
"""Groups in a list of groups of dead letters, those with the newest failure; all are counted."""
EXPLAINED_GROUPS: Final = 20
"""Groups of dead letters, the newest, for which later runs are counted."""
VERSIONS_OF_GROUP: Final = 10
"""Newest definitions of a group of dead letters of which the versions are looked up."""
RUNS_AFTER_GROUP: Final = 100
"""Newest runs of a workflow among which those that completed after a group of dead letters are counted."""
MUTE_SECONDS: Final = 366 * 86_400
MUTE_REASON_LENGTH: Final = 500
QUERY_FIELDS: Final = 50
"""Parameters in a query string."""
SEARCH_LENGTH: Final = 200
"""Characters of a search, or of any other text in a query."""

DISCOVERED: Final = 1_000
"""Listed workflows of an application."""
WORKFLOW_NAME_LENGTH: Final = 200
"""Characters of a workflow's name."""
DESCRIPTION_LENGTH: Final = 5_000
"""Characters of a description."""
VERSIONS: Final = 10_000
"""Versions of a workflow."""
VERSIONS_LISTED: Final = 1_000
"""Versions of a list at once, and unless `limit` is given."""
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
APPLIED_WORKFLOWS: Final = 200
"""Workflows of one `POST /workflows/apply`."""
REMOVED_SECRETS: Final = 1_000
"""Removed credentials that the answer to a copy lists."""
GRAPH_BYTES: Final = 10_000_000
"""Bytes of a graph's nodes as JSON, up to which single nodes can be added."""
NODE_TYPE_LENGTH: Final = 103
"""Characters of a node's type, and of its version."""
NODE_TYPES: Final = 1_000
"""Versions of custom node types of an organization."""
NODE_TYPE_EXAMPLES: Final = 20
"""Examples of a custom node type."""
LABEL_LENGTH: Final = 200
"""Characters of a node's label, and of a port's name."""
FINDINGS: Final = 100
"""Invalid fields, or findings of a validation, that a refusal lists."""
VALIDATION_FINDINGS: Final = MAX_FINDINGS
"""Errors, and warnings, that the answer of a validation lists."""
SETTINGS_BYTES: Final = 20_000
"""Bytes of a workflow's settings as JSON."""
TIMEOUT_SECONDS: Final = 604_800
"""Seconds of the timeout of a run or node: a week."""
PARALLELISM: Final = 64
"""Nodes of one run that wait for something outside at once, by `settings.parallelism`."""
RETRIES: Final = 10
"""Repetitions of a failed run, and attempts of a node."""
RETRY_DELAY_SECONDS: Final = 86_400
"""Seconds between two attempts of a node."""

WINDOWS: Final = 50
"""Windows of a lifecycle policy's schedule."""
TIMEZONE_LENGTH: Final = 64
"""Characters of the name of a time zone."""
HOLD_SECONDS: Final = 7 * 86_400
"""Seconds for which a deployment is kept awake by one request: a week."""
LIFECYCLE_CHANGES: Final = 100
"""Changes of a lifecycle policy, and requests to keep a deployment awake, beside a page of its decisions."""
POD_MILLICORES: Final = 8_000
"""Thousandths of a processor of each pod of a workflow."""
POD_MEBIBYTES: Final = 16_384
"""MiB of memory of each pod of a workflow."""
POD_LOG_LINES: Final = 1_000
"""Log lines of a workflow's pods at once."""
TIMELINE_LANES: Final = 50
"""Workflows of a timeline at once."""
PREVIEW_RUNS: Final = 10_000
"""Recent runs that the preview of a lifecycle policy evaluates."""

DATA_SOURCES: Final = 1_000
"""Data sources of an organization."""
DATA_SOURCE_NAME_LENGTH: Final = 200
"""Characters of a data source's name."""
DATA_SOURCE_HOSTS: Final = data_source_types.MAX_HOSTS
"""Hosts that a data source lists for its secrets."""
SECRET_LENGTH: Final = data_source_types.MAX_SECRET_LENGTH
"""Characters of a secret of a data source."""
DATA_SOURCE_TEST_SECONDS: Final = 10
"""Seconds of the test of a data source."""
DATA_SOURCE_TESTS: Final = 30
"""Tests of data sources of an organization within a minute at one gateway; more get 429."""

MODELS: Final = 1_000
"""Language models of an organization."""
MODEL_NAME_LENGTH: Final = 200
"""Characters of the name of a language model."""
MODEL_TOKENS: Final = 100_000_000
"""Tokens of the context or of an answer of a language model."""
MODEL_COSTS: Final = 1_000
"""Rows of the costs of a month."""
LISTED_PROVIDER_MODELS: Final = 1_000
"""Models in the test of a provider key."""
ACCEPTED_TOOLS: Final = 128
"""Accepted tools of a tool server."""
MODEL_TEST_SECONDS: Final = 60
"""Seconds of the test of a language model."""

BULK_EXECUTIONS: Final = 1_000
"""Executions that one bulk request cancels, retries or deletes."""
BULK_REPLAYS: Final = 200
"""Executions of one bulk replay: each needs a plan of its own."""
BULK_OBJECTS: Final = 10_000
"""Dead letters, or executions, of one bulk operation."""
BULK_PER_SECOND: Final = 1_000
"""Objects per second of a bulk operation."""
BULK_OPEN: Final = 20
"""Bulk operations of an organization that have not ended."""
BULK_LISTED: Final = 100
"""Ids of executions that the answer to a bulk request lists."""

STATE_BYTES: Final = run_state.MAX_STATE_BYTES
"""Bytes of the keys and values that the nodes of an execution publish, as JSON."""
SIGNAL_BYTES: Final = 256_000
"""Bytes of the payload of a signal as JSON."""
REPLIES_AWAITED: Final = 10
"""Requests that wait at one gateway for replies of an execution to signals."""
SIGNAL_REPLY_BYTES: Final = signals.MAX_REPLY_BYTES
"""Bytes of the reply to a signal as JSON."""
UNREAD_SIGNALS: Final = signals.MAX_UNREAD
"""Signals of an execution that no node has received."""

CALLBACK_URL_LENGTH: Final = 2_000
"""Characters of a callback URL."""
CONCURRENT_RUNS: Final = concurrency_limits.MAX_LIMIT
"""Runs at once, by `settings.concurrency.limit`."""
CONCURRENCY_KEY_LENGTH: Final = 500
"""Characters of `settings.concurrency.key`."""

KEY_NAME_LENGTH: Final = 100
"""Characters of a key's name."""
KEY_LIFETIME_SECONDS: Final = 315_360_000
"""Seconds until a key expires: ten years."""
USER_NAME_LENGTH: Final = 200
"""Characters of a user's name."""
EMAIL_LENGTH: Final = 254
"""Characters of an email address."""
INVITATION_SECONDS: Final = 2_592_000
"""Seconds until an invitation expires: 30 days."""
IDEMPOTENCY_KEY_LENGTH: Final = 255
"""Visible ASCII characters of an `Idempotency-Key`."""
IDEMPOTENCY_SECONDS: Final = 86_400
"""Seconds for which an idempotency key is remembered: a day."""

LOWEST_PRIORITY: Final = -100
HIGHEST_PRIORITY: Final = 100
"""Priority of a message, in minutes of waiting."""
SOURCE_LENGTH: Final = 200
"""Characters of the `source` of a message or event."""
EVENT_TYPE_LENGTH: Final = sender_events.MAX_TYPE_LENGTH
"""Characters of the type of an event."""
EVENT_TOKEN_SECRETS: Final = 5
"""Secrets of one provider in an event token."""
EVENT_FAN_OUT_BYTES: Final = 50_000_000
"""Bytes of the inputs of all runs of one event together, as JSON; more is refused."""
DELAY_SECONDS: Final = 31_536_000
"""Seconds of the delay of a message: a year."""
TOKEN_OVERLAP_SECONDS: Final = 604_800
"""Seconds for which a replaced trigger token may stay valid: a week."""
TRIGGER_TOKENS: Final = 10
"""Valid trigger tokens of a workflow at once, replaced ones included; the oldest ends first."""
KEPT_REFUSED_CHARACTERS: Final = 1_000_000
"""Characters of a refused request that is kept for a redrive."""
REDRIVEN_AT_ONCE: Final = 1_000
"""Deliveries or dead letters that one request redrives or purges."""
BATCH_MESSAGES: Final = 1_000
"""Messages that one request enqueues."""
DEDUPLICATION_ID_LENGTH: Final = 255
"""Characters of a deduplication id."""

UNVERIFIED_HOOK_REQUESTS: Final = 5
"""Requests per second to a webhook without verification."""
UNVERIFIED_HOOK_BURST: Final = 20
"""Burst of requests to such a webhook."""

ACCEPTANCES_WAITING: Final = 2_000
"""Executions that wait for their commit at one gateway; more get 503."""
TRIGGER_SYNC_SECONDS: Final = 300
"""Seconds that a synchronous trigger waits for the end of its run, including a cold start."""
TRIGGER_ASYNC_SECONDS: Final = 30
"""Seconds that an asynchronous trigger waits for a pod to claim its run, including a cold start."""
WAKES_WAITING: Final = 1_000
"""Triggers that wait for the start of one deployment at one gateway; more get 503."""
EXPANDED_BYTES: Final = 10_000_000
"""Bytes of outputs kept as blobs that one answer shows with `?expand=blobs`; others stay explained."""
TRIGGER_OUTPUT_CHARACTERS: Final = 20_000_000
"""Characters of the outputs in the answer to a synchronous trigger, as JSON; the execution has larger ones."""
TRIGGER_TYPE_LENGTH: Final = 64
"""Characters of the trigger type of a run."""
WAIT_SECONDS: Final = 30
"""Seconds that a long poll may wait for the end of an execution."""
WAIT_DEFAULT_SECONDS: Final = 9
"""Seconds that a long poll waits for the end of an execution, unless `wait` is given."""
PREFERRED_WAIT_SECONDS: Final = 60
"""Seconds that the start of a run waits for its end, by `Prefer: wait=N`; a larger N is cut to it."""
AWAITED_OUTPUT_CHARACTERS: Final = 1_000_000
"""Characters of the outputs in an answer to `Prefer: wait=N`, as JSON; larger ones are left out."""
PINNED_BYTES: Final = 1_000_000
"""Bytes of the pinned outputs of a run, as JSON."""
TEST_WAIT_DEFAULT_SECONDS: Final = 10
"""Seconds that the test of a node waits for its end, unless `wait` is given."""
POLLS_WAITING: Final = 10_000
"""Long polls at one gateway, shared by all clients."""
LIVE_TOPICS: Final = 20
"""Topics of one stream of hints."""
EVENT_STREAMS: Final = 500
"""Open event streams of executions, and as many streams of hints, at one gateway, shared by all clients."""
RECORDS_DEFAULT: Final = 100
"""Spans or log lines of a list, unless `limit` is given."""
RECORDS_MAX: Final = 1_000
"""Spans or log lines of a list at once."""
