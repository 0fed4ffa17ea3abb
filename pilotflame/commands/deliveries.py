"""Commands for deliveries: inbound requests and their outcomes."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from pilotflame.commands.arguments import AllOption, LimitOption
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list, show_object, take
from pilotflame.commands.server_connection import connect

app = new_noun("Read and redrive inbound requests.")
COLUMNS = {
    "Id": "id",
    "Route": "route",
    "Outcome": "outcome",
    "Status": "status",
    "Reason": "reason",
    "Execution": "executionId",
    "Created": "createdAt",
}
DeliveryArgument = Annotated[str, Argument(metavar="DELIVERY", help="Id of the delivery.")]


@app.command("list")
def list_deliveries(
    workflow: Annotated[
        str | None,
        Argument(
            metavar="[WORKFLOW]", help="Id or exact name of a workflow. Default: all.", show_default=False
        ),
    ] = None,
    outcome: Annotated[
        str | None, Option(help="accepted, duplicate, rejected, deferred or shed.", show_default="all")
    ] = None,
    limit: LimitOption = 20,
    every: AllOption = False,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the newest inbound requests, of one workflow or of the organization."""
    client = connect()
    scope = "" if workflow is None else f"/workflows/{client.workflows.find(workflow)}"
    found = client.iterate(f"/api/v1{scope}/deliveries", "deliveries", {"outcome": outcome}, has_cursor=True)
    show_list(take(found, limit, all_items=every), output, COLUMNS)


@app.command("get")
def get_delivery(delivery: DeliveryArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Print a delivery."""
    show_object(dict(connect().deliveries.get(delivery)), output)


@app.command("redrive")
def redrive(delivery: DeliveryArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Ingest the request of a delivery again."""
    show_object(dict(connect().deliveries.redrive(delivery)), output, key="executionId")


@app.command("samples")
def list_samples(output: FormatOption = OutputFormat.JSON) -> None:
    """List samples of recent requests that were rejected without a delivery."""
    show_list(list(connect().deliveries.iterate_samples()), output, {"Id": "id", "Route": "route"})
