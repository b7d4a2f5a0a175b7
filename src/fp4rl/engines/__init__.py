"""Floor 5: executors of runs, and the environment of processes."""
