"""Floor 2: loading models and tokenizers, the files of checkpoints, and the embedded tiny model."""
