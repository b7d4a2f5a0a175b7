"""Floor 2: harm. Quantization and hardware error put into a model, proven to act, and taken out again."""
