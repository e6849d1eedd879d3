"""What units are scored by. Importing this package registers all of them."""

from hf_compress.pruning.criteria import activations, gradients, others, weights  # noqa: F401 - for what they register
