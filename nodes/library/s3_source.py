"""Read an object of a bucket, or list the keys under a prefix."""

from __future__ import annotations

from nodes.object_source import read_from_bucket as run

__all__ = ["run"]
