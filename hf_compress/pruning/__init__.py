"""Which units go: evidence to scores, scores and a budget to masks; tensors in, tensors out."""
