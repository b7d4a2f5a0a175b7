"""Numbers with their uncertainty: pure functions on numbers and arrays. The training seed is the replicate."""
