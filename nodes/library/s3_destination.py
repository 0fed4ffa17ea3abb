"""Write a value to a bucket as one object."""

from __future__ import annotations

from nodes.object_destination import write_to_bucket as run

__all__ = ["run"]
