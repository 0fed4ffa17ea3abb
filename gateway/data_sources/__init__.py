"""Data sources: credentials that workflows name, and nobody sees again."""
