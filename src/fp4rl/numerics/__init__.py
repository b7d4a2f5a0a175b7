"""Floor 1: number formats as maths on tensors."""
