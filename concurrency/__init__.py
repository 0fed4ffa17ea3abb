"""Building blocks for asynchronous work: offloading, single flight, caches with an expiry, heartbeat."""
