"""Logs that other trainers wrote, read into the same steps and numbers as our own."""
