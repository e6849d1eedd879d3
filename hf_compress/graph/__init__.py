"""Which slices of which parameters belong together, found in one recorded forward pass; knows nothing of training."""
