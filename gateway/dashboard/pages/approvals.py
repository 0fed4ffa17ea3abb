"""Approvals: an inbox of the questions of waiting runs, one of them open with its form, and the answers so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import list_address
from gateway.dashboard.form_fields import list_fields
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

PATH: Final = "/dashboard/approvals"
ANSWERED: Final = "answered"
SHOWN_ANSWERS: Final = 50
TABS: Final[Mapping[str, tuple[str, frozenset[str]]]] = {
    "mine": ("for me", frozenset({"caller"})),
    "groups": ("for my groups", frozenset({"role", "anyone"})),
    "all": ("all open", frozenset({"caller", "role", "anyone", "others"})),
}
"""Label of each tab, and the assignments that it shows."""
REFUSALS: Final = {
    "not-assigned": "This question is for other people.",
    "self-approval": "You have started this run, and may not answer its question.",
    "already-answered": "You have answered. It waits for other people.",
}
NEVER: Final = "9999"
"""Text that sorts behind all times, for questions without an end."""


async def load(page: PageRequest) -> PageData:
    """Ask the API for the open questions, also those of others, and on the tab of answers for 50 of these.

    The questions are None for visitors who may answer none. Raises `ApiError`.
    """
    pending = await page.get_if_present("/api/v1/pending-inputs", others="true")
    answered = None
    if page.query.get("tab") == ANSWERED:
        after = page.query.get("after")
        answered = await page.get("/api/v1/answered-inputs", limit=SHOWN_ANSWERS, after=after)
    return {"pending": pending, "answered": answered}


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the tabs with their counts, the questions of the open one, and the open question.

    Without a tab in the query, the first one with questions is open.
    """
    found = [] if data["pending"] is None else data["pending"]["inputs"]
    listed = sorted(found, key=lambda one: (one["expiresAt"] or NEVER, one["requestedAt"] or NEVER))
    by_tab = {
        tab: [one for one in listed if one["assignment"] in assignments]
        for tab, (_, assignments) in TABS.items()
    }
    answered = data["answered"]
    first = next((tab for tab, questions in by_tab.items() if questions), "mine")
    wanted = frame.query.get("tab", "")
    tab = ANSWERED if answered is not None else wanted if wanted in TABS else first
    questions = by_tab.get(tab, [])
    shown = find_shown(questions, frame.query.get("question"))
    return {
        "title": "Approvals",
        "crumbs": (("Approvals", ""),),
        "count": len(listed),
        "tabs": [
            *(
                (len(by_tab[name]), label, list_address(frame, PATH, {"tab": name}), name == tab)
                for name, (label, _) in TABS.items()
            ),
            (None, "Answered", list_address(frame, PATH, {"tab": ANSWERED}), tab == ANSWERED),
        ],
        "tab": tab,
        "questions": [
            {**one, "address": question_address(frame, tab, one), "is_open": one is shown}
            for one in questions
        ],
        "one": None if shown is None else describe_question(shown),
        # Once a visitor has answered or passed it on, the first of the other ones is open.
        "next": list_address(frame, PATH, {"tab": tab}),
        # The address names the open question, so that an update never replaces it below a pointer.
        "address": "" if shown is None else question_address(frame, tab, shown),
        "answers": () if answered is None else answered["answers"],
        "older": ""
        if answered is None or not answered["next"]
        else list_address(frame, PATH, {"tab": ANSWERED, "after": answered["next"]}),
        "is_newest": not frame.query.get("after"),
        "newest": list_address(frame, PATH, {"tab": ANSWERED}),
        "may_answer": data["pending"] is not None,
        "may_assign": shown is not None and may_assign(shown, frame),
    }


def question_id(question: Mapping[str, Any]) -> str:
    """Return the text that names a question in an address: its run, node and iteration."""
    return f"{question['executionId']}:{question['nodeId']}:{question['iteration']}"


def question_address(frame: PageFrame, tab: str, question: Mapping[str, Any]) -> str:
    """Return the address of the page with a question open on a tab."""
    return list_address(frame, PATH, {"tab": tab, "question": question_id(question)})


def find_shown(questions: Sequence[Mapping[str, Any]], wanted: str | None) -> Mapping[str, Any] | None:
    """Return the question that the address names, or the first one if it names none; None if there is no such one.

    Another one in place of a question that somebody has answered could get a click that was meant for that.
    """
    named = (one for one in questions if not wanted or question_id(one) == wanted)
    return next(named, None)


def may_assign(question: Mapping[str, Any], frame: PageFrame) -> bool:
    """Return whether the visitor may pass a question on: an admin, or one of its people."""
    is_admin = frame.visitor is not None and frame.visitor["role"] == "admin"
    return is_admin or question["refusal"] in {None, "already-answered"}


def describe_question(question: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a question with the fields of its form, its people in words, and the reason of a refusal."""
    names = question["assigneeNames"]
    people = ["all admins" if one == "role:admin" else names.get(one, one) for one in question["assignees"]]
    labels = {choice["port"]: choice["label"] for choice in question["choices"]}
    return {
        **question,
        "fields": list_fields(question["schema"]),
        "people": ", ".join(people) or "everybody who may execute the workflow",
        "votes": [
            {**vote, "label": labels.get(vote["choice"], vote["choice"])} for vote in question["votes"]
        ],
        "refused": REFUSALS.get(question["refusal"] or "", ""),
        "excluded": "" if question["allowsSelf"] or not question["startedBy"] else question["startedByName"],
    }


PAGE: Final = Page(PATH, "approvals.html", load, view, "approvals", ("executions",))
