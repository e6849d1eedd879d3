"""Compress Transformers inside a plain Hugging Face Trainer.

Importing this package registers the loader of models with uneven layers, so ``AutoModelFor...`` is here too:
``hf_compress.AutoModelForSequenceClassification`` is transformers' own class, with the loader in place.
"""

from typing import Any

import transformers

from hf_compress.callbacks.distillation import DistillationCallback
from hf_compress.callbacks.preview import Preview, preview
from hf_compress.callbacks.pruning import PruningCallback
from hf_compress.callbacks.quantization import QuantizationCallback
from hf_compress.callbacks.state import last_complete_checkpoint
from hf_compress.config import (
    DatasetConfig,
    DistillationConfig,
    PruningConfig,
    PruningRule,
    QuantizationConfig,
    Recipe,
    ShrinkConfig,
    StageConfig,
)
from hf_compress.errors import (
    CompressionError,
    ConfigError,
    ExportError,
    GraphError,
    ShrinkError,
    TargetError,
    TrainingError,
)
from hf_compress.export import pretrained  # noqa: F401 - imported for the loader it registers
from hf_compress.export.quantized import export_quantized
from hf_compress.graph.groups import DimensionGroup, ParameterSlice
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.labels import make_labels
from hf_compress.graph.model import dimension_groups
from hf_compress.graph.op_rules import op_rule
from hf_compress.pruning import allocate, criteria, learned  # noqa: F401 - imported for what they register
from hf_compress.recipe import RunResult, make_callbacks, run_recipe
from hf_compress.report.compare import compare
from hf_compress.report.profile import ModelProfile, profile
from hf_compress.shrinking.plan import ShrinkPlan, plan_shrink
from hf_compress.shrinking.shrink import shrink
from hf_compress.vocabulary.prune import prune_vocabulary

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Pass transformers' Auto classes on."""
    if name.startswith("Auto") and hasattr(transformers, name):
        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CompressionError",
    "ConfigError",
    "DatasetConfig",
    "DimensionGroup",
    "DistillationCallback",
    "DistillationConfig",
    "ExportError",
    "GraphError",
    "ModelProfile",
    "ParameterSlice",
    "Preview",
    "PruningCallback",
    "PruningConfig",
    "PruningRule",
    "QuantizationCallback",
    "QuantizationConfig",
    "Recipe",
    "RunResult",
    "ShrinkConfig",
    "ShrinkError",
    "ShrinkPlan",
    "StageConfig",
    "TargetError",
    "TrainingError",
    "compare",
    "dimension_groups",
    "export_quantized",
    "last_complete_checkpoint",
    "make_callbacks",
    "make_example_inputs",
    "make_labels",
    "op_rule",
    "plan_shrink",
    "preview",
    "profile",
    "prune_vocabulary",
    "run_recipe",
    "shrink",
]
