"""Readers and writers of file formats that several nodes share."""
