"""Measures Pilotflame on this machine: real processes, driven over HTTP, with every result read and checked."""
