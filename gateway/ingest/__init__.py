"""How what senders send is taken in: who they are, what it brings, and what is kept of it."""
