"""Chromium of the machine, driven by the Chrome DevTools Protocol, and gateways that serve it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn

from tests.integration.gateway_harness import GatewayHarness

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_SECONDS = 30.0
"""Longer than any page takes on a busy machine: an expression that is never true must not hold up all tests."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.02, 0.08
"""Pauses between questions to the page, each of which takes some milliseconds of CPU time: most come true soon, and
others, such as the end of a bulk act, only after seconds.
"""
LOADED = "document.readyState === 'complete'"
"""Condition under which the scripts of a page have run."""
LEAVE = "globalThis.isLeft = true"
ARRIVED = f"!globalThis.isLeft && {LOADED}"
"""Condition under which a page after the one that was marked by `LEAVE` is loaded."""
SERVER_ERROR = -32_000
"""Code of the protocol for an expression whose page was left, or is not there yet."""
DISABLED_FEATURES = (
    *("Translate", "OptimizationHints", "MediaRouter", "PaintHolding", "SpareRendererForSitePerProcess"),
    # Pages that were left are kept for a way back, and each page gets a frame of its own: a fifth of a visit.
    *("BackForwardCache", "RenderDocument"),
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--in-process-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--no-proxy-server", "--remote-debugging-port=0"),
    # The window of an app, which cannot be about:blank, has no tabs and no field for addresses: they would take half of
    # the start.
    "--app=data:text/html,",
    # Work besides the pages, which costs a tenth of the browser's time.
    *("--disable-extensions", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-smooth-scrolling", "--disable-checker-imaging"),
    f"--disable-features={','.join(DISABLED_FEATURES)}",
    # Each page compiles its scripts anew, and is left before optimized code has paid for itself: a sixth of the
    # browser's time where axe runs.
    "--js-flags=--no-maglev,--no-opt",
    # One process shows all pages: a new one, at each step between about:blank and a page of the gateway, would compile
    # the scripts of the page and of axe again, which is a third of the browser's time.
    *("--disable-site-isolation-trials", "--renderer-process-limit=1"),
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


class DocumentGoneError(Exception):
    """The browser has left the page in which a script was evaluated."""


class ScriptError(Exception):
    """A script has raised an exception, such as one about a property of an element that the page lacks."""


class BrowserPage:
    """Page of a browser, driven by the Chrome DevTools Protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._count = 0
        self.problems: list[str] = []
        """Console errors, uncaught exceptions and violations of policies."""
        self.requested: list[str] = []
        """URLs of all requests."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
        """Call a method of the protocol and return its result; events that arrive before are recorded.

        Raises `DocumentGoneError` if a script was evaluated while the browser left its page.
        """
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": parameters})
        async for message in self._socket:
            answer = json.loads(message.data)
            if answer.get("id") == self._count:
                if method == "Runtime.evaluate" and answer.get("error", {}).get("code") == SERVER_ERROR:
                    raise DocumentGoneError(answer["error"]["message"])
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)
        raise ConnectionError("the browser has closed the page")

    async def evaluate(self, expression: str) -> Any:  # noqa: ANN401 - any JSON value
        """Return the value of an expression in the page, awaited if it is a promise.

        About an element that a click or an update brings, ask `wait_for`, `text` or `value` instead: they wait
        for it. Raises `ScriptError`.
        """
        found = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise ScriptError(f"{expression}: {found}")
        return found["result"].get("value")

    async def wait_for(self, expression: str) -> Any:  # noqa: ANN401 - any JSON value
        """Return the value of an expression as soon as it is true; fails after 30 seconds.

        An exception counts as false, such as one about an element that is not there yet. If the browser leaves the
        page, the next one is asked.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                value = await self.evaluate(expression)
            except (DocumentGoneError, ScriptError) as error:
                value, problem = None, str(error)
            else:
                problem = f"it is {value!r}"
            if value:
                return value
            assert time.monotonic() < deadline, f"{expression}: {problem}"
            await asyncio.sleep(pause)
            pause = min(1.2 * pause, LONGEST_PAUSE_SECONDS)

    async def text(self, selector: str) -> str:
        """Return the text of the first matching element as soon as the page is loaded and has it."""
        return str(await self._of_element(selector, "element.textContent"))

    async def value(self, selector: str) -> str:
        """Return the value of the first matching field as soon as the page is loaded and has it."""
        return str(await self._of_element(selector, "element.value"))

    async def count(self, selector: str) -> int:
        """Return the number of matching elements as soon as the page is loaded."""
        (found,) = await self.wait_for(f"{LOADED} && [document.querySelectorAll({selector!r}).length]")
        return int(found)

    async def fill(self, selector: str, text: str) -> None:
        """Replace the text of a field as if it were typed, also of one that React controls."""
        await self._of_element(
            selector,
            "(Object.getOwnPropertyDescriptor(Object.getPrototypeOf(element), 'value')"
            f".set.call(element, {json.dumps(text)}), element.dispatchEvent(new Event('input', {{bubbles: true}})))",
        )

    async def click(self, selector: str) -> None:
        """Click the first matching element as soon as the page is loaded and has it; returns at once."""
        await self._of_element(selector, "element.click()")

    async def follow(self, selector: str) -> None:
        """Click an element that leads to another page, and wait until that page is loaded.

        The page before often satisfies the condition that a test would wait for, so that the next question would be
        answered by either page.
        """
        await self.evaluate(LEAVE)
        await self.click(selector)
        await self.wait_for(ARRIVED)

    async def open(self, url: str, ready: str = "true") -> None:
        """Open a page, and wait until it is loaded and the expression `ready` is true in it."""
        await self.evaluate(LEAVE)
        answer = await self.call("Page.navigate", url=url)
        is_left = "loaderId" in answer  # absent if the fragment alone has changed: the page stays
        arrived = ARRIVED if is_left else LOADED
        await self.wait_for(f"{arrived} && location.href.startsWith({url!r}) && ({ready})")

    async def _of_element(self, selector: str, expression: str) -> Any:  # noqa: ANN401 - any JSON value
        """Return the value of an expression about `element`, once the page is loaded and has one."""
        (value,) = await self.wait_for(
            f"{LOADED} && (element => element && [{expression}])(document.querySelector({selector!r}))"
        )
        return value

    def _note(self, event: dict[str, Any]) -> None:
        """Record a problem or a request that an event of the browser reports."""
        parameters = event["params"]
        match event["method"]:
            case "Runtime.exceptionThrown" | "Log.entryAdded":
                self.problems.append(json.dumps(parameters))
            case "Runtime.consoleAPICalled" if parameters["type"] in {"error", "assert"}:
                self.problems.append(json.dumps(parameters))
            case "Network.requestWillBeSent":
                self.requested.append(parameters["request"]["url"])


@asynccontextmanager
async def open_page(folder: Path) -> AsyncIterator[BrowserPage]:
    """Start a browser with its profile in a folder, yield its page, and kill it after the block."""
    process = await asyncio.create_subprocess_exec(
        str(CHROMIUM),
        *(*FLAGS, f"--user-data-dir={folder}"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        ports = folder / "DevToolsActivePort"
        while not ports.exists() or "\n" not in ports.read_text():
            assert process.returncode is None
            await asyncio.sleep(0.05)
        port = ports.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                (target,) = [one for one in await answer.json() if one["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = BrowserPage(socket)
                for domain in ("Page", "Runtime", "Network", "Log"):
                    await page.call(f"{domain}.enable")
                yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@asynccontextmanager
async def serve_gateway(harness: GatewayHarness) -> AsyncIterator[str]:
    """Serve the gateway of a harness on a free port during the block, and yield its URL."""
    server = uvicorn.Server(
        uvicorn.Config(harness.app, host="127.0.0.1", port=0, log_config=None, lifespan="off")
    )
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - it sets no event
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
