"""JSON text, read at a cost that is known beforehand."""
