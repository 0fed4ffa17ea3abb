"""Mail parsing and composition, independent of transport."""
