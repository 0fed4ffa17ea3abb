"""What is stored, and the rules that need nothing but what is stored."""
