"""Endpoint of the doctor's findings."""
