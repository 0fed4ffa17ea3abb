"""Who sent a request, whether it is truly theirs, how they name it when they send it again, and what it means."""
