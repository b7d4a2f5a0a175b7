"""The audit of published results: intervals, confounds, and treatments that never acted."""
