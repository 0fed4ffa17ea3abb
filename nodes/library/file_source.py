"""Read a file in the organization's folder, or list the files below a prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nodes import object_source

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json


async def run(call: NodeCall) -> Json:
    return await object_source.read_objects(call, await call.services.files.folder(call.caller))
