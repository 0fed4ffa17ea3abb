"""Requests and answers: from the bytes of a connection to a handler that is called with whatever it needs."""
