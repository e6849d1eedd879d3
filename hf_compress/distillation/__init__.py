"""What a student learns from its teacher: tensors in, tensors out. Importing this package registers all losses."""

from hf_compress.distillation import (  # noqa: F401 - for what they register
    attention,
    hidden,
    logits,
    relations,
    structure,
)
