"""Floor 2: injection. Quantization and hardware errors put into a model, proven to act, and taken out again."""
