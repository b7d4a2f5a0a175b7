"""Floor 3: reinforcement learning and evaluation."""
