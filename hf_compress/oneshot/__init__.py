"""Pruning a trained model on a few batches, without training."""
