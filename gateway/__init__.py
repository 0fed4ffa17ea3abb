"""HTTP API of Pilotflame: accepts runs and reports their results, but never executes them."""
