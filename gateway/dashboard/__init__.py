"""Dashboard: pages of the gateway, each rendered from answers of public routes."""
