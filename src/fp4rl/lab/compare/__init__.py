"""Two arms held against each other: first whether they may be, then by how much they differ."""
