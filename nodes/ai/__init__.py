"""Language models: clients of their providers, loaded with the first call."""
