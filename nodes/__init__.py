"""The nodes: a catalogue of pairs, `.toml` (what it is) and `.py` (what it does)."""
