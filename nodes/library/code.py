"""Run a user's script in a sandbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nodes import config_fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_SECONDS = 60
SMALLEST_SECONDS = 0.001
MAXIMUM_MEGABYTES = 512
SMALLEST_MEGABYTES = 8
LOOP_ROOTS = ("item", "index")


async def run(call: NodeCall) -> Json:
    config = call.config
    source = call.values["source"].render(call.scope, call.unresolved)
    seconds = config_fields.read_number(
        config, "timeoutSeconds", minimum=SMALLEST_SECONDS, maximum=MAXIMUM_SECONDS
    )
    megabytes = config_fields.read_number(
        config, "maxMemoryMb", minimum=SMALLEST_MEGABYTES, maximum=MAXIMUM_MEGABYTES
    )
    names = {name: call.scope[name] for name in LOOP_ROOTS if name in call.scope}
    return await call.services.code.run(
        call.caller,
        config_fields.read_text({"source": source}, "source"),
        {"data": call.data, "inputs": config_fields.read_mapping(config, "inputs"), **names},
        timeout_seconds=seconds,
        max_memory_bytes=int(megabytes * 2**20),
        print_line=call.log,
    )
