"""Node types, in pairs of `.toml` (description) and `.py` (implementation), and the services that they use."""
