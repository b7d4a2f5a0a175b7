"""Floor 1: loading models and tokenizers, and the embedded tiny model."""
