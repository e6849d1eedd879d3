"""What operators do to dimensions, and which of that forbids to remove single units."""

FREEZING_ROLES = {
    "conflict": "{op}{where} uses it in two ways that cannot be made one",
    "no_rule": "{op}{where} has no op rule; add one with hf_compress.graph.op_rules.op_rule",
    "wrong_rule": "the op rule of {op} gave dimensions that do not fit its result{where}",
    "opaque": "{op}{where} is used in a form that is not understood",
    "output": "it is a dimension of {op}",
    "input": "it is a dimension of {op}",
    "constant": "it is a dimension of {op}{where}",
    "position_dependent": "{op}{where} makes its content from the position",
    "numeric": "{op}{where} computes with its size",
    "convolution_group": "{op}{where} ties it to convolution groups",
    "kernel": "it is a kernel size of {op}{where}",
    "spatial": "it is a spatial size of {op}{where}",
    "indexed": "{op}{where} looks its positions up by number",
    "selected": "{op}{where} picks single positions",
    "accumulated": "{op}{where} sums up to each position",
    "normalized": "{op}{where} normalizes over it",
    "averaged": "its positions are averaged by {op}{where}",
    "reduced": "its positions are reduced by {op}{where}",
    "ranked": "{op}{where} ranks its positions",
    "softmax": "{op}{where} normalizes over it",
}
"""Roles that forbid removal of single units, with the reason given to users, the most telling first."""

SUBSET_ROLES = ("normalized", "averaged", "reduced", "ranked", "softmax")
"""Roles of operators that look at all positions together. They do not forbid removal where one module that reads and
writes the dimension holds them (a norm, a router): it can be run on the units that are kept, see ``graph.subsets``."""

ROLES = {*FREEZING_ROLES, "contracted", "contracted_activations", "head_dim", "heads", "routed"}
"""Every role; those that do not freeze tell kinds of groups apart and where gates act."""
