"""The ledger: an index of all runs in one database, which can be rebuilt from the run folders at any time."""
