"""Agents: their decisions, recorded steps, tools, and the checks of their wiring."""
