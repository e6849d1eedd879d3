"""What can be pruned, by name."""

STRUCTURES = ("heads", "ffn", "hidden", "head_dim", "layers", "experts", "vocab", "other")
"""The kinds of dimension group, see ``hf_compress.graph.groups``."""

WEIGHTS = "weights"
"""The structure that is no dimension group: the weights of single layers, see ``PruningConfig.granularity``."""

TRAINABLE_STRUCTURES = ("heads", "ffn", "hidden", "head_dim", "layers", "experts", "other", WEIGHTS)
"""The structures that can be pruned while training."""

WIDTHS = ("ffn", "hidden", "head_dim", "other")
"""The structures that ``multiple_of`` speaks of: their sizes are those of matrices."""
