"""JSON decoding with a bounded cost."""
