"""Transforms of a model that keep its function: rotations and smoothing scales, in its weights alone."""
