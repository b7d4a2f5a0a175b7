"""Floor 1: the sites of a model, where numbers are rounded, and reading them."""
