"""What published results allow to be said: intervals, confounds, and treatments that never happened."""
