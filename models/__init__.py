"""Tables, and rules that need nothing but stored values."""
