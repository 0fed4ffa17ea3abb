"""Chromium of the machine, driven by the Chrome DevTools Protocol, and gateways that serve it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
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
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


class BrowserPage:
    """A page of a browser, driven by the Chrome DevTools Protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._count = 0
        self.problems: list[str] = []
        """Console errors, uncaught exceptions and violations of policies."""
        self.requested: list[str] = []
        """URLs of all requests."""

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
        """Call a method of the protocol; notes the events that arrive before its result."""
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": parameters})
        async for message in self._socket:
            answer = json.loads(message.data)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)
        raise ConnectionError("the browser has closed the page")

    async def evaluate(self, expression: str) -> Any:  # noqa: ANN401 - any JSON value
        """Return the value of an expression in the page, awaited if it is a promise."""
        found = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def wait_for(self, expression: str) -> Any:  # noqa: ANN401 - any JSON value
        """Return the value of an expression as soon as it is true."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not (value := await self.evaluate(expression)):  # noqa: ASYNC110 - a page sets no event of ours
                await asyncio.sleep(0.02)
        return value

    async def fill(self, selector: str, text: str) -> None:
        """Type a text into a field, also one that React controls."""
        await self.wait_for(f"document.querySelector({selector!r}) !== null")
        await self.evaluate(
            f"((field, set) => {{ set.call(field, {text!r});"
            f" field.dispatchEvent(new Event('input', {{bubbles: true}})) }})"
            f"(document.querySelector({selector!r}),"
            " Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set)"
        )

    async def click(self, selector: str) -> None:
        """Click an element as soon as it is there."""
        await self.wait_for(f"document.querySelector({selector!r}) !== null")
        await self.evaluate(f"document.querySelector({selector!r}).click()")

    async def open(self, url: str, ready: str) -> None:
        """Open a page, until an expression about it is true."""
        await self.call("Page.navigate", url=url)
        await self.wait_for(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")
        await self.wait_for(ready)

    def _note(self, event: dict[str, Any]) -> None:
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
    """Start a browser with a profile of its own, and open a page in it."""
    process = await asyncio.create_subprocess_exec(
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--remote-debugging-port=0", f"--user-data-dir={folder}", "--no-proxy-server", "about:blank"),
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
    """Serve a gateway on a port of its own, and return its URL."""
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
