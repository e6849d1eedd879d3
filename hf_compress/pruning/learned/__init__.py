"""Methods that learn by gradient what may go. Importing this package registers all of them."""

from hf_compress.pruning.learned import admm, l0, movement, slim  # noqa: F401 - for what they register
