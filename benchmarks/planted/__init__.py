"""Runs whose health is known: healthy ones with many settings, failures planted in real runs, synthesised courses."""
