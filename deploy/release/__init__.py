"""Tools of a release: the audit of the locks, and the bill of materials."""
