"""Floor 3: diagnosis. The effect of quantization on a model, site by site, and advice."""
