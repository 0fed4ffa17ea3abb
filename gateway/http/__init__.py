"""HTTP layer of the gateway: from the bytes of a connection to the call of a handler, and its answer."""
