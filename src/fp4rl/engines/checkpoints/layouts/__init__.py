"""Layouts of packed checkpoints, a file each: names and types of tensors, and the files that describe them."""
