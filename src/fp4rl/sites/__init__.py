"""Floor 1: the sites of a model, where numbers can be rounded, and observing what flows through them."""
