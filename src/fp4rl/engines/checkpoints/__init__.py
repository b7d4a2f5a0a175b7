"""Packed checkpoints: written from a run's own rounded values, and compared with them."""
