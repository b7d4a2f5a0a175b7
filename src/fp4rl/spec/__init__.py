"""Floor 0: frozen, validated descriptions of everything, and typed records of runs; nothing here imports torch."""
