"""What this machine can do, and whether what is installed computes as it should."""
