"""Checkpoints whose weights are stored as codes and scales, by fp4rl or by others: what they hold, and their values."""
