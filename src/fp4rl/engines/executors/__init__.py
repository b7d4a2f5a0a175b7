"""Executors: each runs planned runs in its own way, by the protocol `Executor` of `lab/runner.py`."""
