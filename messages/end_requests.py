"""Notification of a stop or cancel request, which processes would otherwise notice later."""

from contextlib import suppress

from messages.broker import Broker, BrokerUnavailable


async def notify_end_request(
    broker: Broker, execution_id: str, request: str, *, lease_owner: str | None, channel: str
) -> None:
    """Send the `request` to the worker that holds the run, or notify the waiting clients if the run has ended by it."""
    # Without the broker, the worker learns of it when it renews its lease, and clients poll once a second.
    with suppress(BrokerUnavailable):
        if lease_owner is None:
            await broker.publish({execution_id: channel})
        else:
            await broker.send(lease_owner, {"execution_id": execution_id, "request": request})
