"""Settings of a workflow for its runs and pods: concurrency, failure notification, resources."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from engine.expressions import ExpressionError, compile_template
from engine.model_calls import ModelBudget
from gateway.http import limits, text_rules
from gateway.http.wire import StrictWire
from gateway.workflows import callback_checks
from journal.concurrency_limits import LimitAction
from journal.run_labels import METADATA_KEY

if TYPE_CHECKING:
    from gateway.http.text_rules import ProblemCollector


class ConcurrencySettings(StrictWire):
    """Concurrency limit of the runs of a workflow."""

    limit: Annotated[int, Meta(ge=1, le=limits.CONCURRENT_RUNS)]
    """Maximum number of runs in progress at once."""
    key: Annotated[str, text_rules.describe_length(limits.CONCURRENCY_KEY_LENGTH, min_length=1)] | None = None
    """Expression such as `{{ trigger.body.customer }}`: the limit applies to each of its values separately.
    """
    on_limit: LimitAction = LimitAction.QUEUE
    """Handling of further runs: `queue` makes them wait, `reject` refuses them with 429."""


class FailureSettings(StrictWire):
    """Notification about a failed run: either a workflow or a URL."""

    workflow_id: str | None = None
    """Workflow that runs once, for the user of the failed run.

    Its inputs are `executionId`, `workflowId`, `workflowName`, `status`, `error`, `startedAt` and `endedAt`.
    """
    url: Annotated[str, text_rules.describe_length(limits.CALLBACK_URL_LENGTH, min_length=1)] | None = None
    """URL that gets a message, signed with the signing secret of the organization."""


class ResourceSettings(StrictWire):
    """Resources of a pod: requests and limits."""

    cpu_millicores: Annotated[int, Meta(ge=50, le=limits.POD_MILLICORES)] = 500
    """Thousandths of a processor."""
    memory_mebibytes: Annotated[int, Meta(ge=128, le=limits.POD_MEBIBYTES)] = 256
    """Memory in MiB."""


class KnownSettings(StrictWire):
    """Settings of the runs of a workflow, and of its pods."""

    timeout: Annotated[float, Meta(gt=0, le=limits.TIMEOUT_SECONDS)] = 3600
    """Seconds that a run may take. Waiting for a timer, a person, an event or another run does not count."""
    retry_on_failure: bool = False
    """Repeat a failed run from the node that failed, up to `maxRetries` times."""
    max_retries: Annotated[int, Meta(ge=0, le=limits.RETRIES)] = 3
    """Repetitions of a failed run if `retryOnFailure` is true."""
    strict_mappings: bool = False
    """Fail a node if one of its paths has no value. New workflows have true by default."""
    parallelism: Annotated[int, Meta(ge=1, le=limits.PARALLELISM)] = 16
    """Maximum number of nodes of one run that wait for something outside, such as an HTTP answer, at once."""
    concurrency: ConcurrencySettings | None = None
    """Limit of runs at once; absent: no limit."""
    on_failure: FailureSettings | None = None
    """Notification about failed runs: a workflow to run, or a URL to call."""
    ai_budget: ModelBudget | None = None
    """Budget for calls of language models in a run and its sub-workflows together, reserved before each call."""
    resources: ResourceSettings | None = None
    """Processor and memory of each pod of the deployed workflow."""
    metadata: (
        Annotated[
            dict[
                str, Annotated[str, text_rules.describe_length(limits.CONCURRENCY_KEY_LENGTH, min_length=1)]
            ],
            Meta(max_length=limits.METADATA_KEYS),
        ]
        | None
    ) = None
    """Metadata of runs by messages, mails, webhooks, events and schedules, by key: expressions such as
    `{{ trigger.body.order }}`, evaluated when a run is accepted. One that finds nothing is left out.
    """


def check_settings(
    known: KnownSettings,
    workflow_id: str,
    problems: ProblemCollector,
) -> None:
    """Add problems of settings that types can't express to `problems`.

    They are invalid expressions, keys and URLs, and a workflow that names itself as its failure workflow.
    """
    concurrency, on_failure = known.concurrency, known.on_failure
    if concurrency is not None and concurrency.key is not None:
        _check_expression(concurrency.key, "settings.concurrency.key", problems)
    if on_failure is not None:
        _check_failure(on_failure, workflow_id, problems)
    for name, expression in (known.metadata or {}).items():
        if not METADATA_KEY.match(name):
            message = "A key of settings.metadata must match ^[a-z][A-Za-z0-9_-]{0,39}$, as in order"
            problems.add("settings.metadata", "invalid-key", message)
        else:
            _check_expression(expression, f"settings.metadata.{name}", problems)


def _check_expression(expression: str, path: str, problems: ProblemCollector) -> None:
    """Add a problem unless `expression` reads the trigger and nothing else, and has at most 500 characters."""
    if len(expression) > limits.CONCURRENCY_KEY_LENGTH:
        message = f"{path} may have at most {limits.CONCURRENCY_KEY_LENGTH:,} characters"
        problems.add(path, "too-long", message)
        return
    try:
        template = compile_template(expression)
    except ExpressionError as error:
        problems.add(path, "invalid-expression", f"{path}: {error}")
        return
    if not template.paths or any(one.root != "trigger" for one in template.paths):
        message = f"{path} must be an expression that reads the trigger: {{{{ trigger.body.customer }}}}"
        problems.add(path, "invalid-expression", message)


def _check_failure(on_failure: FailureSettings, workflow_id: str, problems: ProblemCollector) -> None:
    """Add a problem unless the failure settings name either another workflow, which need not exist, or a valid URL."""
    path = "settings.onFailure"
    if (on_failure.workflow_id is None) == (on_failure.url is None):
        problems.add(path, "conflict", f"{path} must have a workflowId or a url, and not both")
    elif on_failure.url is not None:
        callback_checks.check_callback(on_failure.url, f"{path}.url", problems)
    elif on_failure.workflow_id == workflow_id:
        message = "A workflow can't be its own failure workflow"
        problems.add(f"{path}.workflowId", "self-reference", message)
    else:
        text_rules.check_identifier(on_failure.workflow_id or "", f"{path}.workflowId", problems)
