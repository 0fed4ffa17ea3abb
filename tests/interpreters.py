"""Pythons of this machine that are as old or as new as the SDK supports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from docs.tables import ROOT

NEWEST_MINOR = 20
"""Minor version of Python 3 up to which is searched."""


def find_oldest() -> str | None:
    """Return the path of the oldest Python that the SDK supports; None if this machine lacks it."""
    project = tomllib.loads((ROOT / "sdk/python/pyproject.toml").read_text())["project"]
    found = re.fullmatch(r">=3\.(\d+)", project["requires-python"])
    assert found is not None, project["requires-python"]
    return _find(int(found[1]))


def find_newest() -> str:
    """Return the path of the newest Python of this machine, at least the one that runs the tests."""
    newer = range(NEWEST_MINOR, sys.version_info.minor, -1)
    return next((path for minor in newer if (path := _find(minor)) is not None), sys.executable)


def _find(minor: int) -> str | None:
    """Return the path of a released Python 3, on PATH or of pyenv."""
    name = f"python3.{minor}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [shutil.which(name), *(str(one) for one in sorted(pyenv.glob(f"3.{minor}.*/bin/{name}")))]
    return next((one for one in candidates if one is not None and _has_venv(one, minor)), None)


def _has_venv(path: str, minor: int) -> bool:
    # The shim of pyenv exists for versions that are not installed; a Debian package may lack venv.
    program = (
        f"import sys, venv; sys.exit(sys.version_info[:2] != (3, {minor}) or 'alpha' in sys.version_info)"
    )
    return subprocess.run([path, "-c", program], capture_output=True, check=False).returncode == 0
