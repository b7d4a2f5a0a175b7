"""Whether an engine that samples computes with the policy that is trained: by weight, by score, by order."""
