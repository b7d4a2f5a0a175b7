"""Logs of other trainers, read into steps and numbers like those of fp4rl's own runs."""
