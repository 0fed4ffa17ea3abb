"""Child processes that run untrusted or long work: user code, forms, SQLite, library nodes."""
