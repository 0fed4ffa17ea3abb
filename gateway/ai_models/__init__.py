"""Language models of organizations: registration, access and tests."""
