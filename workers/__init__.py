"""Workers: processes that claim pending runs, execute them, and record their results."""
