"""What one process may ask of another: lossy wake-ups and notices, since the rows are the truth."""
