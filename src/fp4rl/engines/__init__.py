"""Floor 5: processes and other people's engines."""
