"""Floor 0: what everything is called. Frozen, validated descriptions; nothing here imports torch."""
