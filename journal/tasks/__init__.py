"""Tasks of custom nodes: moves between states, and their store."""
