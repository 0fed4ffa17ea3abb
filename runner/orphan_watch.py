"""Detection of an orphaned pod: its gateway is gone or refuses it, or its folder was deleted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from runner.gateway_client import GatewayClient

CHECK_SECONDS: Final = 1.0


async def wait_orphaned(gateway: GatewayClient, patience_seconds: float | None) -> str:
    """Wait until this pod is orphaned, checked each second; return the reason as a text for the log.

    It is orphaned if its working folder is gone, or its gateway was away, or refused it, for `patience_seconds`; None
    means without limit.
    """
    while _has_folder():
        failing_seconds = gateway.failing_seconds
        if patience_seconds is not None and failing_seconds > patience_seconds:
            return f"its gateway was away, or refused it, for {failing_seconds:.0f} s"
        await asyncio.sleep(CHECK_SECONDS)
    return "the folder that it works in is gone"


def _has_folder() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True
