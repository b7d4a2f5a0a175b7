"""The health monitor: checks of a run's metrics, live or on any log with known metrics."""
