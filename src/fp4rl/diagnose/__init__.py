"""Floor 3: what quantization does to a model, site by site, and what to do about it."""
