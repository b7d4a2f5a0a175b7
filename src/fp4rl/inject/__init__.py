"""Floor 2: injection. Puts quantization and hardware errors into a model, records that they act, takes them out."""
