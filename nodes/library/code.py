"""A user's script is run where it can do nothing but compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nodes import fields

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_SECONDS = 60
SMALLEST_SECONDS = 0.001
MAXIMUM_MEGABYTES = 512
SMALLEST_MEGABYTES = 8
OF_A_LOOP = ("item", "index")


async def run(call: NodeCall) -> Json:
    config = call.config
    source = call.values["source"].render(call.scope, call.unresolved)
    seconds = fields.number(config, "timeoutSeconds", minimum=SMALLEST_SECONDS, maximum=MAXIMUM_SECONDS)
    megabytes = fields.number(config, "maxMemoryMb", minimum=SMALLEST_MEGABYTES, maximum=MAXIMUM_MEGABYTES)
    names = {name: call.scope[name] for name in OF_A_LOOP if name in call.scope}
    return await call.services.code.run(
        call.caller,
        fields.text({"source": source}, "source"),
        {"data": call.data, "inputs": fields.mapping(config, "inputs"), **names},
        timeout_seconds=seconds,
        max_memory_bytes=int(megabytes * 2**20),
        print_line=call.log,
    )
