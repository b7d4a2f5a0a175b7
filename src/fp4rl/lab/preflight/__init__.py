"""Preflight: every known trap, where it is caught, and the checks that act before a run."""
