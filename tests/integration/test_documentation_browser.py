"""Pages of the documentation work in a browser, under their policies and without another host."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.documentation import site
from tests.integration.browser import needs_chromium, open_page, serve_gateway
from tests.integration.gateway_harness import create_gateway
from tests.services import PostgresServer

pytestmark = [
    needs_chromium,
    pytest.mark.skipif(not (site.BUILT / site.MANIFEST).exists(), reason="`make docs` builds the site"),
]


SHOWN_PATHS = (
    "(paths => paths.length < 10 && paths)([...document.querySelectorAll('.opblock-summary-path')]"
    ".map(path => path.dataset.path))"
)
"""Paths of the shown operations; false while there are many. The viewer shows those in view, of a long list."""


async def test_search_and_requests_work_without_another_host(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    async with (
        create_gateway("sqlite", postgres, tmp_path) as harness,
        serve_gateway(harness) as url,
        open_page(tmp_path / "profile") as page,
    ):
        key = (await harness.people()).admin.key
        await page.open(f"{url}/docs/", "document.querySelector('h1') !== null")
        await page.open(
            f"{url}/docs/search.html?q=resume", "document.querySelectorAll('ul.search li').length > 3"
        )
        await page.open(f"{url}/docs/api/", SHOWN_PATHS)
        await page.wait_for(
            f"scrollTo(0, document.body.scrollHeight) ?? String({SHOWN_PATHS}).includes('/workflows/')"
        )
        await page.fill(".operation-filter-input", "resume")
        await page.wait_for(f"String({SHOWN_PATHS}).includes('/api/v1/executions/{{id}}/resume')")
        await page.click("button.authorize")
        await page.fill(".auth-container input", key)
        await page.click(".auth-btn-wrapper button.authorize")
        await page.click(".btn-done")
        await page.fill(".operation-filter-input", "whoami")
        await page.wait_for(f"String({SHOWN_PATHS}) === '/api/v1/auth/whoami'")
        await page.click(".opblock-summary-control")
        await page.click(".try-out__btn")
        await page.click(".btn.execute")
        status = await page.wait_for(
            "document.querySelector('.live-responses-table .response .response-col_status')?.innerText"
        )
        assert status.split()[0] == "200"
        assert not page.problems
        assert f"{url}/api/v1/auth/whoami" in page.requested
        assert not [one for one in page.requested if not one.startswith((f"{url}/", "data:", "about:"))]
