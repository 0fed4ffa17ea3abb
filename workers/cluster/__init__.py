"""Where deployed workflows have compute of their own: one protocol, and a driver for each kind of place."""
