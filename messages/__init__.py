"""Messages between processes: lossy wakeups and notifications, since the rows are the truth."""
