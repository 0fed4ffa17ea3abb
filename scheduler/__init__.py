"""What is done by the clock: one process leads, and whatever it does is harmless when it is done twice."""
