"""One delivery: its outcome with the reason, its sender and content, and the runs that it has started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.page import Page, PageData, PageFrame
from gateway.dashboard.pages.delivery_list import MEANINGS, REDRIVEN_IN_BULK, can_redrive

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest


async def load(page: PageRequest) -> PageData:
    """Ask the API for the delivery, and for its workflow, None for that of an event; raises `ApiError`."""
    delivery = await page.get(f"/api/v1/deliveries/{page.parameters['id']}")
    workflow_id = delivery["workflowId"]
    workflow = await page.get_if_present(f"/api/v1/workflows/{workflow_id}") if workflow_id else None
    return {"delivery": delivery, "workflow": workflow}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the delivery, its runs, and the label of its redrive with the question before
    it.

    A redrive is a new attempt to process a delivery. The label is empty if there is none, or without the right.
    """
    delivery, name = data["delivery"], data["workflow"]["name"] if data["workflow"] else ""
    has_run = delivery["outcome"] not in REDRIVEN_IN_BULK
    label = "Redrive…" if has_run else "Redrive"
    return {
        "title": f"Delivery by {delivery['route']}",
        "crumbs": (("Deliveries", f"{frame.root}/dashboard/deliveries"), (delivery["id"], "")),
        "one": delivery,
        "workflow_name": name,
        "runs": [delivery["executionId"]] if delivery["executionId"] else delivery["executionIds"],
        "meaning": MEANINGS.get(delivery["outcome"], ""),
        "label": label if can_redrive(delivery) and frame.may("workflows:execute") else "",
        "question": f"Run {name} once more on this request? Its nodes write again." if has_run else "",
    }


PAGE: Final = Page("/dashboard/deliveries/{id}", "delivery.html", load, view, "deliveries", ("deliveries",))
