"""Connection of a worker with the server: claims of tasks by an open poll, and reports in a thread of their own.

Lost answers are safe: a repeated claim has the `requestId` of the first and gets the same tasks, a repeated report is
answered with `repeated`. Tasks of a long poll begin after a report that keeps their leases.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from pilotflame_sdk.errors import APIError, PilotflameError, TransportError
from pilotflame_sdk.held_tasks import FINAL_KINDS, AttemptKey, HeldTask, HeldTasks
from pilotflame_sdk.request_coding import ANSWER_SECONDS
from pilotflame_sdk.tasks import plain_text

if TYPE_CHECKING:
    from typing import TypeAlias

    from pilotflame_sdk.transport import Transport
    from pilotflame_sdk.worker_connection import WorkerConnection

    TaskServer: TypeAlias = Transport | WorkerConnection

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 300
"""Time of a poll without tasks, which the server changes by up to a fifth. It sends a space every 25 seconds."""
SHORT_POLL_SECONDS: Final = 45
"""Time of a poll at older servers, and behind proxies that cut long requests or keep the spaces to themselves."""
FIRST_SHORT_POLLS_SECONDS: Final = 60.0
"""Time for which polls are short after a long one has failed, perhaps by a restart of the server. It doubles with each
further failure, up to `LONGEST_SHORT_POLLS_SECONDS`.
"""
LONGEST_SHORT_POLLS_SECONDS: Final = 3_600.0
"""Longest time for which polls are short, and that after a server has refused a long one."""
CUT_SECONDS: Final = 55.0
"""Age from which a poll that fails may have been cut for its length: proxies allow a request a minute."""
SILENCE_SECONDS: Final = 60.0
"""Time without a byte after which a connection is given up."""
INLINE_BYTES: Final = 256_000
"""Larger outputs are sent apart from reports."""
MAX_CLAIM: Final = 100
FRESH_SECONDS: Final = 5.0
"""Age of a poll up to which its tasks begin at once. The answer to an older one may have waited in a frozen worker, or
in the network, for longer than the first lease of 10 seconds.
"""
DEADLINE_LOOK_SECONDS: Final = 0.2
FILL_SECONDS: Final = 0.005
"""Time for which a claim waits for more free slots, so that short tasks are claimed in batches."""
LONGEST_PAUSE: Final = 5.0
MAX_REASON: Final = 1_000
VALUE_RETRY_SECONDS: Final = 30.0
"""Time for which large values are sent or fetched again: a gateway that restarts fails no task."""
LEASE_HEADER: Final = "X-Task-Lease"
UNPROCESSABLE: Final = 422
GATEWAY_TIMEOUT: Final = 504
TEMPORARY: Final = frozenset({408, 429, 500, 502, 503, 504})


class TaskChannel:
    """Claims and reports of one worker. `on_tasks` gets claimed tasks, `on_drain` is called when no more will come."""

    def __init__(
        self,
        server: Callable[[float], TaskServer],
        worker: Mapping[str, str],
        types: Sequence[Mapping[str, str]],
        pools: Sequence[str],
        held: HeldTasks,
        on_tasks: Callable[[list[HeldTask]], None],
    ) -> None:
        self._server = server
        self._worker = dict(worker)
        self._types = [dict(one) for one in types]
        self._pools = [*pools]
        self._held = held
        self._on_tasks = on_tasks
        self.draining = threading.Event()
        self._closing = threading.Event()
        self._polling = threading.Event()
        self.failure: PilotflameError | None = None
        """Error that no repetition mends, such as a key without the scope."""
        self._names_leases = True
        self._short_until = 0.0
        """Time until which polls are short, by the monotonic clock."""
        self._short_seconds = 0.0
        """Time for which polls were short after the last failure of a long one; 0 once a long one was answered."""
        self._threads = [
            threading.Thread(target=run, name=f"pilotflame-{name}", daemon=True)
            for name, run in (
                ("claims", self._claim_tasks),
                ("control", self._await_cancels),
                ("reports", self._send_reports),
                ("deadlines", self._watch_deadlines),
            )
        ]

    def start(self) -> None:
        """Start the threads that claim tasks and send reports."""
        for thread in self._threads:
            thread.start()

    def drain(self) -> None:
        """Claim no more tasks, and notify the server that this worker stops.

        The open poll is not interrupted, since its answer may have tasks. If the server can't be reached, that is
        logged.
        """
        self.draining.set()
        with self._held.changed:
            self._held.changed.notify_all()
        try:
            with self._connect() as server:
                server.request("POST", "/api/v1/tasks/stop", json={"worker": self._worker["id"]})
        except PilotflameError as error:
            log.warning("the server does not know that this worker stops: %s", error)

    def join_claims(self, timeout: float) -> None:
        """Wait until the thread that claims tasks has ended, at most `timeout` seconds."""
        self._threads[0].join(timeout)

    def close(self, timeout: float) -> None:
        """Send the last reports, for at most `timeout` seconds, and end the threads."""
        give_up_at = time.monotonic() + timeout
        with self._held.changed:
            while not self._held.is_empty and (left := give_up_at - time.monotonic()) > 0:
                self._held.changed.wait(left)
        self._closing.set()
        self._held.wake()
        self._threads[2].join(1.0)

    def _connect(self, retry_seconds: float = 0.0) -> TaskServer:
        """Return a connection: by default one whose requests the channel repeats by itself."""
        return self._server(retry_seconds)

    # ── claims ────────────────────────────────────────────────────────────────────────────────────────────

    def _claim_tasks(self) -> None:
        """Claim tasks for free slots until the worker drains; the body of a thread."""
        with self._connect() as server:
            while not self.draining.is_set():
                with self._held.changed:
                    if self._held.free == 0:
                        self._held.changed.wait(1.0)
                        continue
                    if self._held.free * 2 < self._held.slots:
                        self._held.changed.wait(FILL_SECONDS)
                    free = self._held.free
                self._polling.set()
                try:
                    self._claim(server, min(free, MAX_CLAIM))
                finally:
                    self._polling.clear()

    def _await_cancels(self) -> None:
        """Keep a poll open that only cancels tasks, while every slot is taken; the body of a thread."""
        with self._connect() as server:
            while not self.draining.is_set():
                if self._polling.is_set() or not self._held.is_running:
                    self.draining.wait(0.1)
                else:
                    self._claim(server, 0)

    def _claim(self, server: TaskServer, count: int) -> None:
        """Claim up to `count` tasks; the request is repeated under one id until it is answered.

        With 0, the answer only names cancelled tasks. A refusal that would be the same again stops the worker.
        """
        request_id, pause = uuid4().hex, 0.1
        body = {
            "worker": self._worker,
            "requestId": request_id,
            "max": count,
            "types": self._types,
            "pools": self._pools,
        }
        while not self._closing.is_set():
            begun = time.monotonic()
            is_long = begun >= self._short_until
            body["wait"] = POLL_SECONDS if is_long else SHORT_POLL_SECONDS
            try:
                answer = _send(server, "claim", body, "tasks", wait=SILENCE_SECONDS - ANSWER_SECONDS)
            except TransportError as error:
                log.warning("claims wait for the server: %s", error)
                self._note_failed_poll(begun)
            except APIError as error:
                self._note_failed_poll(begun, error.status)
                if is_long and error.status == UNPROCESSABLE:  # the server is older than long polls
                    continue
                if error.status not in TEMPORARY:
                    self._stop_for(error)
                    return
                log.warning("claims wait for the server: %s", error)
            else:
                self._note_answered_poll(begun)
                self._take_answer(server, request_id, begun, answer)
                return
            if self.draining.is_set():
                return
            self._closing.wait(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    def _note_failed_poll(self, begun: float, status: int | None = None) -> None:
        """Send short polls for a time if a long one has failed because of its length, or perhaps did.

        `begun` is its beginning by the monotonic clock, and `status` that of its answer, None without one.
        """
        now = time.monotonic()
        was_cut = now - begun >= CUT_SECONDS if status is None else status in {UNPROCESSABLE, GATEWAY_TIMEOUT}
        # The poll was short, or the other thread has noted the same failure, if it began before that time.
        if was_cut and begun >= self._short_until:
            is_refused = status == UNPROCESSABLE
            least_seconds = LONGEST_SHORT_POLLS_SECONDS if is_refused else FIRST_SHORT_POLLS_SECONDS
            self._short_seconds = min(
                max(2 * self._short_seconds, least_seconds), LONGEST_SHORT_POLLS_SECONDS
            )
            self._short_until = now + self._short_seconds

    def _note_answered_poll(self, begun: float) -> None:
        """Begin with the shortest time again once a poll was answered that a proxy would have cut."""
        if time.monotonic() - begun >= CUT_SECONDS:
            self._short_seconds = 0.0

    def _take_answer(
        self, server: TaskServer, request_id: str, begun: float, answer: Mapping[str, Any]
    ) -> None:
        """Start the tasks of an answered claim, ask cancelled ones to stop, and drain if the server says so."""
        if answer["tasks"]:
            added = self._held.add(request_id, answer["tasks"])
            if time.monotonic() - begun > FRESH_SECONDS:
                self._confirm(server, added)
            self._on_tasks(added)
        self._held.cancel(answer.get("cancel", ()))
        if answer.get("drain"):
            self.draining.set()

    def _confirm(self, server: TaskServer, attempts: Sequence[HeldTask]) -> None:
        """Renew the leases of claimed attempts before they begin; attempts that are lost are marked as such.

        Repeated until the server answers.
        """
        items = [{"id": held.id, "lease": held.lease, "kind": "heartbeat"} for held in attempts]
        while items and not self._report_safely(server, items, [held.key for held in attempts], None):
            if self._closing.wait(LONGEST_PAUSE / 10):
                return

    def _watch_deadlines(self) -> None:
        """End attempts at their deadlines, and log where functions in threads are, which can't be ended; the body of a
        thread.
        """
        while not self._closing.wait(DEADLINE_LOOK_SECONDS):
            for held in self._held.end_overdue():
                frame = sys._current_frames().get(held.thread_id or 0)  # noqa: SLF001 - the documented way
                if frame is not None:
                    stack = "".join(traceback.format_stack(frame))
                    log.warning(
                        "%r has exceeded its timeout, and its function still runs:\n%s", held.task, stack
                    )

    def _stop_for(self, error: APIError) -> None:
        """Claim nothing more after a refusal, which `failure` keeps unless the worker was stopped on purpose."""
        if error.code != "worker-stopped":
            self.failure = error
        self.draining.set()

    # ── reports ───────────────────────────────────────────────────────────────────────────────────────────

    def _send_reports(self) -> None:
        """Send reports when they are due, and renew leases; the body of a thread.

        A report is repeated until the server answers it.
        """
        pause = 0.1
        with self._connect() as server:
            while not self._closing.is_set():
                self._held.wait_for_report()
                items, keys, claimed = self._held.build_report()
                while (items or keys) and not self._closing.is_set():
                    if self._report_safely(server, items, keys, claimed):
                        pause = 0.1
                        break
                    self._held.end_expired()
                    self._closing.wait(pause)
                    pause = min(pause * 2, LONGEST_PAUSE)

    def _report_safely(
        self,
        server: TaskServer,
        items: Sequence[Mapping[str, Any]],
        keys: Sequence[AttemptKey],
        claimed: str | None,
    ) -> bool:
        """Send a report like `_report`, and return True for an unexpected error,
        which is logged and fails the reported tasks.

        Without the thread that calls this, all leases would end.
        """
        try:
            return self._report(server, items, keys, claimed)
        except Exception:
            log.exception("a report could not be sent")
            for item in items:
                self._give_up(item, "The report could not be sent: see the log of the worker")
            return True

    def _report(
        self,
        server: TaskServer,
        items: Sequence[Mapping[str, Any]],
        keys: Sequence[AttemptKey],
        claimed: str | None,
    ) -> bool:
        """Send a report; return whether the server has answered it, with success or a refusal.

        A refused report is sent again item by item; tasks of refused items fail.
        """
        begun = time.monotonic()
        held = [{"id": task_id, "lease": lease} if self._names_leases else task_id for task_id, lease in keys]
        body = {"worker": self._worker["id"], "claimed": claimed, "held": held, "items": items}
        try:
            answer = _send(server, "report", body, "results")
        except TransportError as error:
            log.warning("reports wait for the server: %s", error)
            return False
        except APIError as error:
            if error.status in TEMPORARY:
                log.warning("reports wait for the server: %s", error)
                return False
            if self._names_leases and any(str(one.get("path")).startswith("held") for one in error.details):
                self._names_leases = False  # the server is older than leases in `held`
                return False
            if len(items) > 1:
                # One of them is at fault: the others must arrive.
                return all(self._report(server, [one], keys, claimed) for one in items)
            log.exception("the server refuses a report")
            for item in items:
                self._give_up(item, str(error))
            return True
        for item, result in self._held.take_results(items, keys, answer["results"], begun):
            error_text = result.get("error") or {}
            log.error("task %s: %s %s", item["id"], error_text.get("code"), error_text.get("message"))
        return True

    def _give_up(self, item: Mapping[str, Any], reason: str) -> None:
        """Replace a result that the server does not take by a failure; forget a
        task if its failure or release is refused too.

        Items that are no final reports are ignored.
        """
        if item["kind"] == "complete":
            error = {"code": "report-refused", "message": plain_text(reason, MAX_REASON)}
            key = (str(item["id"]), str(item["lease"]))
            self._held.replace_report(key, {"kind": "fail", "error": error, "retry": False})
        elif item["kind"] in FINAL_KINDS:
            self._held.take_results([item], (), [{"status": "lost"}], time.monotonic())

    # ── large values ──────────────────────────────────────────────────────────────────────────────────────

    def fetch_input(self, held: HeldTask) -> Any:  # noqa: ANN401 - any JSON
        """Return the input of a task, fetched by a request of its own if it is large.

        Raises `APIError` and `TransportError`.
        """
        given = held.task.input
        if not (isinstance(given, dict) and given.keys() == {"$blob"}):
            return given
        with self._connect(VALUE_RETRY_SECONDS) as server:
            headers = {LEASE_HEADER: held.lease}
            return server.request("GET", f"/api/v1/tasks/{held.id}/input", headers=headers, wait=60.0)

    def send_output(self, held: HeldTask, output: object) -> object:
        """Return the output for a report: itself up to 256,000 bytes of JSON, else a reference after sending
        it apart.

        Raises `TypeError` and `ValueError` for a value that is no JSON, and `APIError` and `TransportError`.
        """
        size = len(json.dumps(output, allow_nan=False))
        if size <= INLINE_BYTES:
            held.output_bytes = size
            return output
        with self._connect(VALUE_RETRY_SECONDS) as server:
            headers = {LEASE_HEADER: held.lease}
            path = f"/api/v1/tasks/{held.id}/output"
            # Keyed: it may be repeated, since the same output replaces itself.
            server.request("PUT", path, json=output, headers=headers, wait=60.0, is_keyed=True)
        return {"$blob": {}}


def _send(
    server: TaskServer, action: str, body: Mapping[str, Any], list_field: str, *, wait: float = 0.0
) -> Mapping[str, Any]:
    """Send a claim or report and return its answer, which has a list in `list_field`.

    Raises `APIError`, and `TransportError` also for other JSON: that of a proxy, for example, during maintenance.
    """
    answer = server.request("POST", f"/api/v1/tasks/{action}", json=body, wait=wait)
    if not (isinstance(answer, dict) and isinstance(answer.get(list_field), list)):
        raise TransportError(f"The answer to the {action} is not that of Pilotflame")
    return answer
