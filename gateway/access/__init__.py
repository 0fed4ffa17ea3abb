"""Keys, users, signing secrets and the audit log."""
