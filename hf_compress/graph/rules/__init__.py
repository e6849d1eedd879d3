"""The rules for ATen operators; importing this package registers them."""

from hf_compress.graph.rules import contract, index, layout, reduce, spatial

__all__ = ["contract", "index", "layout", "reduce", "spatial"]
