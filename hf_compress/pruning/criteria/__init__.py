"""What units are scored by. Importing this package registers all of them."""

from hf_compress.pruning.criteria import (  # noqa: F401 - for what they register
    activations,
    gradients,
    oneshot,
    others,
    weights,
)
