"""Bill of materials of the wheel (SBOM, CycloneDX 1.6): run by `make dist`, from the lock with its hashes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from deploy.release.audit import ENVIRONMENT, ROOT

FOLDER: Final = ROOT / "dist"


def write_bill(folder: Path) -> Path:
    """Write the bill of materials of `requirements.lock` into a folder, created if missing; return its path.

    The same lock makes the same bytes. Raises CalledProcessError if cyclonedx-bom fails.
    """
    folder.mkdir(exist_ok=True)
    target = folder / "pilotflame.cdx.json"
    subprocess.run(
        [
            str(ENVIRONMENT.folder / "bin/cyclonedx-py"),
            *("requirements", "--pyproject", str(ROOT / "pyproject.toml"), "--output-reproducible"),
            *("--spec-version", "1.6", "--validate", "--output-file", str(target)),
            str(ROOT / "requirements.lock"),
        ],
        check=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    return target


if __name__ == "__main__":
    sys.stdout.write(f"{write_bill(FOLDER).relative_to(ROOT)}\n")
