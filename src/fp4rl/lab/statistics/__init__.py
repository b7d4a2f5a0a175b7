"""Estimates with intervals: pure functions on numbers and arrays. The training seed is the unit of replication."""
