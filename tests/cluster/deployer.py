"""Deployer that deploys its argument, reports that, and stays until it is killed."""

import asyncio
import sys
from pathlib import Path

import msgspec

from workers.cluster import local_driver
from workers.cluster.driver import DesiredDeployment


async def deploy(folder: Path, desired: DesiredDeployment) -> None:
    """Deploy a workflow by the local driver, print "ready" once it is, and stay until this process is killed."""
    driver = await local_driver.open_local(folder, runs_without_isolation=True)
    await driver.apply(desired)
    async for workflow_id in driver.watch():
        if (await driver.observe(workflow_id)).is_ready:
            break
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(
        deploy(Path(sys.argv[1]), msgspec.json.decode(sys.stdin.buffer.readline(), type=DesiredDeployment))
    )
