"""Executors: each carries planned runs out somewhere, as the protocol of `lab/runner.py` says."""
