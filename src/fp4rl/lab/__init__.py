"""Floor 4: suites, runs, the ledger, statistics and the report."""
