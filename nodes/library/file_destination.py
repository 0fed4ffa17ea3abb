"""Write a value to a file in the organization's folder, replacing an existing one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nodes import object_destination

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json:
    written = await object_destination.write_object(call, await call.services.files.folder(call.caller))
    return {name: written[name] for name in ("key", "size", "contentType")}
