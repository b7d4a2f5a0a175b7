"""The comparison of two arms: first whether they may be compared, then by how much they differ."""
