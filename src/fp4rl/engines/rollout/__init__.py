"""Samplers in other engines than the trainer's own model."""
