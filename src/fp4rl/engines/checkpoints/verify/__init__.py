"""Whether a checkpoint holds what was trained: by value, against the live model that the trainer computed with."""
