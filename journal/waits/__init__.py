"""Waiting nodes and completion actions: answers, events, sub-workflow runs."""
