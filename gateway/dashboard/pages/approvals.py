"""Approvals: an inbox of the questions of waiting runs, one of them open with its form, and the answers so far."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard.addresses import page_address
from gateway.dashboard.form_fields import list_fields
from gateway.dashboard.formats import show_count
from gateway.dashboard.page import Page, PageData, PageFrame

if TYPE_CHECKING:
    from gateway.dashboard.page_request import PageRequest

PATH: Final = "/dashboard/approvals"
ANSWERED: Final = "answered"
SHOWN_ANSWERS: Final = 50
SHOWN_QUESTIONS: Final = 50
START: Final = "start"
"""Cursor of the first page, as the API has it."""
TABS: Final[Mapping[str, tuple[str, str]]] = {
    "mine": ("for me", "caller"),
    "groups": ("for my groups", "role,anyone"),
    "all": ("all open", ""),
}
"""Label of each tab, and the assignments that it shows; empty for all."""
REFUSALS: Final = {
    "not-assigned": "This question is for other people.",
    "self-approval": "You have started this run, and may not answer its question.",
    "already-answered": "You have answered. It waits for other people.",
}
NEVER: Final = "9999"
"""Text that sorts behind all times, for questions without an end."""


async def load(page: PageRequest) -> PageData:
    """Ask the API for 50 open questions of the open tab, or for 50 answers, and for the numbers of questions; raises
    `ApiError`.

    The numbers come with the visitor's own questions (`mine`), and with those of the groups or all (`counted`). Both
    have 50 questions if the open tab shows their first page, else one. The questions are None for visitors who may
    answer none. Without a tab in the query, the first one with questions is open.
    """
    given = page.query
    after, tab = given.get("after", START), given.get("tab", "")
    counting_tab = "all" if tab == "all" else "groups"

    async def ask(tab: str, *, limit: int = SHOWN_QUESTIONS, cursor: str = START) -> Any:  # noqa: ANN401 - a JSON answer
        return await page.get_if_present(
            "/api/v1/pending-inputs", others="true", assignment=TABS[tab][1], limit=limit, after=cursor
        )

    is_own, is_first = tab not in {ANSWERED, "groups", "all"}, after == START
    is_counting_shown = is_first and tab not in {ANSWERED, "mine"}
    mine, counted = await asyncio.gather(
        ask("mine", limit=SHOWN_QUESTIONS if is_own and is_first else 1),
        ask(counting_tab, limit=SHOWN_QUESTIONS if is_counting_shown else 1),
    )
    if tab == ANSWERED:
        cursor = given.get("after")
        answered = await page.get("/api/v1/answered-inputs", limit=SHOWN_ANSWERS, after=cursor)
        return {"mine": mine, "counted": counted, "tab": ANSWERED, "questions": None, "answered": answered}
    questions = mine
    if counted is not None:
        tab = tab if tab in TABS else find_first_tab(mine, counted)
        known = {"mine": mine if is_own else None, counting_tab: counted if is_counting_shown else None}
        questions = known.get(tab) if is_first else None
        questions = await ask(tab, cursor=after) if questions is None else questions
    return {"mine": mine, "counted": counted, "tab": tab or "mine", "questions": questions, "answered": None}


def find_first_tab(mine: Mapping[str, Any], counted: Mapping[str, Any]) -> str:
    """Return the name of the first tab that has questions, `mine` if there are none."""
    counts = count_tabs(mine, counted)
    return next((tab for tab in TABS if counts[tab][0]), "mine")


def count_tabs(
    mine: Mapping[str, Any] | None, counted: Mapping[str, Any] | None
) -> Mapping[str, tuple[int, bool]]:
    """Return by tab its number of questions, and whether there may be more; 0 for all if either answer is None."""
    if mine is None or counted is None:
        return dict.fromkeys(TABS, (0, False))
    counts, is_lower_bound = counted["assignments"], counted["countIsLowerBound"]
    groups = sum(counts[one] for one in TABS["groups"][1].split(","))
    return {
        "mine": (mine["count"], mine["countIsLowerBound"]),
        "groups": (groups, is_lower_bound),
        "all": (sum(counts.values()), is_lower_bound),
    }


def view(data: PageData, frame: PageFrame) -> Mapping[str, Any]:
    """Return the template values: the tabs with their counts, the questions of the open one, and the open question.

    The questions of a page are sorted by their end, the earliest first.
    """
    tab, answered = data["tab"], data["answered"]
    counts = count_tabs(data["mine"], data["counted"])
    found = data["questions"] or {"inputs": (), "next": None}
    questions = sorted(
        found["inputs"], key=lambda one: (one["expiresAt"] or NEVER, one["requestedAt"] or NEVER)
    )
    cursor = frame.query.get("after", "")
    after = {} if cursor in {"", START} else {"after": cursor}
    shown = find_shown(questions, frame.query.get("question"))
    following = found["next"] if answered is None else answered["next"]
    return {
        "title": "Approvals",
        "crumbs": (("Approvals", ""),),
        "count": show_bounded(*counts["all"]),
        "tabs": [
            *(
                (show_bounded(*counts[name]), label, page_address(frame, PATH, {"tab": name}), name == tab)
                for name, (label, _) in TABS.items()
            ),
            (None, "Answered", page_address(frame, PATH, {"tab": ANSWERED}), tab == ANSWERED),
        ],
        "tab": tab,
        "questions": [
            {**one, "address": question_address(frame, tab, one, after), "is_open": one is shown}
            for one in questions
        ],
        "one": None if shown is None else describe_question(shown),
        # Once a visitor has answered or passed it on, the first of the other ones is open.
        "next": page_address(frame, PATH, {"tab": tab, **after}),
        # The address names the open question, so that an update never replaces it below a pointer.
        "address": "" if shown is None else question_address(frame, tab, shown, after),
        "answers": () if answered is None else answered["answers"],
        "older": page_address(frame, PATH, {"tab": tab, "after": following}) if following else "",
        "is_newest": not after,
        "newest": page_address(frame, PATH, {"tab": tab}),
        "may_answer": data["mine"] is not None,
        "may_assign": shown is not None and may_assign(shown, frame),
    }


def show_bounded(count: int, is_lower_bound: bool) -> str:  # noqa: FBT001 - the pair of a count
    """Return a number of questions as text, with `+` if there may be more."""
    return f"{show_count(count)}+" if is_lower_bound else show_count(count)


def question_id(question: Mapping[str, Any]) -> str:
    """Return the text that names a question in an address: its run, node and iteration."""
    return f"{question['executionId']}:{question['nodeId']}:{question['iteration']}"


def question_address(
    frame: PageFrame, tab: str, question: Mapping[str, Any], after: Mapping[str, str]
) -> str:
    """Return the address of the page with a question open on a tab; `after` has the cursor of the page as a
    parameter, or nothing.
    """
    return page_address(frame, PATH, {"tab": tab, "question": question_id(question), **after})


def find_shown(questions: Sequence[Mapping[str, Any]], wanted: str | None) -> Mapping[str, Any] | None:
    """Return the question with the id `wanted`, or the first one if `wanted` is empty; None if it is not in the list.

    A question that somebody has answered is not replaced by the next one: a click could approve the wrong one.
    """
    named = (one for one in questions if not wanted or question_id(one) == wanted)
    return next(named, None)


def may_assign(question: Mapping[str, Any], frame: PageFrame) -> bool:
    """Return whether the visitor may pass a question on: as an admin, or as a person who may answer or has
    answered it.
    """
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
