"""Verification and parsing of requests from senders: signatures, deduplication keys, events and mails."""
