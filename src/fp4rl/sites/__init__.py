"""Floor 1: the places in a model where numbers are rounded, and reading them."""
