"""Mail as such: what arrived is read, and what is to be sent is written, without knowing how either travels."""
