"""Migrations of the tables.

Expand first, contract a release later, so that old and new processes can run side by side.
"""
