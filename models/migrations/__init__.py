"""Migrations of the tables: expand first, contract a release later, so that old and new processes can run
side by side.
"""
