"""Build hook of the wheel: adds the compiled form of each module, so that the first start compiles nothing.

Installers such as uv compile nothing by default, and some users of a process may not write beside its modules. A Python
of another version ignores these files.
"""

from __future__ import annotations

import py_compile
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompiledModules(BuildHookInterface[BuilderConfig]):
    """Compiles the packages of the wheel into a temporary folder."""

    PLUGIN_NAME = "custom"
    _folder: TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile all modules of the packages, and add the files to the wheel; nothing for an editable installation."""
        if version == "editable":
            return
        self._folder = TemporaryDirectory()
        root = Path(self.root)
        for package in self.build_config.packages:
            for source in sorted((root / package).rglob("*.py")):
                # In the wheel, only the last folder of the path to a package remains.
                place = source.relative_to((root / package).parent)
                name = f"{place.stem}.{sys.implementation.cache_tag}.pyc"
                compiled = Path(self._folder.name, place.parent, "__pycache__", name)
                # Unchecked: an installer may change the times of files.
                py_compile.compile(
                    str(source),
                    str(compiled),
                    str(place),
                    doraise=True,
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                )
                build_data["force_include"][str(compiled)] = str(place.parent / "__pycache__" / name)

    def finalize(self, _version: str, _build_data: dict[str, Any], _artifact_path: str) -> None:
        """Remove the temporary folder of the compiled files."""
        if self._folder is not None:
            self._folder.cleanup()
