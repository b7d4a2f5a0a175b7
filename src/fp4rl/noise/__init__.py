"""Floor 2: adaptive quantization noise (AQN), scheduled, undone to the exact bits, with evidence that it acted."""
