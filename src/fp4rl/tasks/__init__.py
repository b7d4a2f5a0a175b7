"""Floor 1: problems with known answers."""
