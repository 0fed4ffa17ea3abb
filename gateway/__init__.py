"""The HTTP edge: asks for work, and shows what became of it; never does it."""
