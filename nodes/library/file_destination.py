"""A value is written to the organisation's folder as one file, which replaces the one before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nodes import object_destination

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json:
    written = await object_destination.write_object(call, await call.services.files.folder(call.caller))
    return {name: written[name] for name in ("key", "size", "contentType")}
