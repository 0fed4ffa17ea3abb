"""Commands that move messages of external queues to a workflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from pilotflame import server_processes
from pilotflame.command_error import CommandError
from pilotflame.commands.nouns import new_noun

if TYPE_CHECKING:
    from bridge.settings import BridgeSettings

app = new_noun("Move messages of an external queue to a workflow.")


Workflow = Annotated[str | None, Option(help="Id of the workflow.", show_default=False)]
Name = Annotated[
    str | None,
    Option(help="Name that distinguishes this source from others.", show_default="the source's own"),
]
Refusals = Annotated[
    Literal["stop", "drop", "dead-letter"] | None,
    Option(
        "--on-refused", help="Handling of messages that the gateway refuses for good.", show_default="stop"
    ),
]
Batch = Annotated[int | None, Option(help="Maximum number of messages in one request.", show_default="100")]


@app.command("redis")
def bridge_redis(
    workflow: Workflow = None,
    stream: Annotated[str | None, Option(help="Key of the stream.")] = None,
    group: Annotated[str | None, Option(help="Consumer group.", show_default="pilotflame")] = None,
    consumer: Annotated[
        str | None, Option(help="Name in the group.", show_default="name of the machine")
    ] = None,
    delete: Annotated[bool | None, Option("--delete", help="Delete entries after they are accepted.")] = None,
    name: Name = None,
    on_refused: Refusals = None,
    batch: Batch = None,
) -> None:
    """Move entries of a Redis stream to a workflow.

    PILOTFLAME_BRIDGE_REDIS_URL is the address of Redis.

    Each option has an environment variable, such as PILOTFLAME_BRIDGE_WORKFLOW and PILOTFLAME_BRIDGE_REDIS_STREAM.
    """
    from bridge.settings import RedisBridgeSettings

    own = {"stream": stream, "group": group, "consumer": consumer, "delete": delete}
    given = {"workflow": workflow, "name": name, "on_refused": on_refused, "batch": batch}
    _run_bridge(RedisBridgeSettings, {**given, **{f"redis_{word}": value for word, value in own.items()}})


@app.command("sqs")
def bridge_sqs(
    workflow: Workflow = None,
    queue_url: Annotated[str | None, Option(help="URL of the queue.")] = None,
    endpoint: Annotated[
        str | None, Option(help="Address of the server.", show_default="address of the queue")
    ] = None,
    name: Name = None,
    on_refused: Refusals = None,
    batch: Batch = None,
) -> None:
    """Move messages of an SQS-compatible queue to a workflow.

    AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are its credentials.

    Each option has an environment variable, such as PILOTFLAME_BRIDGE_WORKFLOW and PILOTFLAME_BRIDGE_SQS_QUEUE_URL.
    """
    from bridge.settings import SqsBridgeSettings

    given = {"workflow": workflow, "name": name, "on_refused": on_refused, "batch": batch}
    _run_bridge(SqsBridgeSettings, {**given, "sqs_queue_url": queue_url, "sqs_endpoint": endpoint})


@app.command("rabbitmq")
def bridge_rabbitmq(
    workflow: Workflow = None,
    queue: Annotated[str | None, Option(help="Name of the queue, which must exist.")] = None,
    name: Name = None,
    on_refused: Refusals = None,
    batch: Batch = None,
) -> None:
    """Move messages of a RabbitMQ queue to a workflow.

    PILOTFLAME_BRIDGE_RABBITMQ_URL is the address of RabbitMQ.

    Each option has an environment variable, such as PILOTFLAME_BRIDGE_WORKFLOW and PILOTFLAME_BRIDGE_RABBITMQ_QUEUE.
    """
    from bridge.settings import RabbitmqBridgeSettings

    given = {"workflow": workflow, "name": name, "on_refused": on_refused, "batch": batch}
    _run_bridge(RabbitmqBridgeSettings, {**given, "rabbitmq_queue": queue})


def _run_bridge(kind: type[BridgeSettings], given: Mapping[str, Any]) -> None:
    """Run a bridge with settings from the command line, which win, and the environment until it is stopped.

    Raises `CommandError` for failures that an operator must fix, and `InvalidSettings` and pydantic's `ValidationError`
    for unusable settings.
    """
    settings = kind(**{f"bridge_{name}": value for name, value in given.items() if value is not None})
    server_processes.begin_log(settings)
    from bridge import bridge_errors, main

    try:
        main.serve(settings)
    except bridge_errors.BridgeRefused as error:
        raise CommandError(str(error)) from error
