"""Readers of file formats that several nodes share."""
