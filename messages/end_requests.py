"""The notice about a run that was asked to end, for those who would otherwise hear of it later."""

from contextlib import suppress

from messages.broker import Broker, BrokerUnavailable


async def notify_end_request(
    broker: Broker, execution_id: str, request: str, *, lease_owner: str | None, channel: str
) -> None:
    """Tell the worker that holds a run of the `request`; of one that has ended by it, whoever waits for that."""
    # With the broker away, the worker hears of it when it renews its lease, and who waits looks every second.
    with suppress(BrokerUnavailable):
        if lease_owner is None:
            await broker.publish({execution_id: channel})
        else:
            await broker.send(lease_owner, {"execution_id": execution_id, "request": request})
