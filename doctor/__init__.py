"""Doctor: findings about stores that disagree with each other, with the promises, or with safe settings."""
