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
    AnnealingConfig,
    DatasetConfig,
    DistillationConfig,
    FeatureConfig,
    ParameterSpace,
    PruningConfig,
    PruningRule,
    QuantizationConfig,
    QuantizationRule,
    Ramp,
    Recipe,
    SearchConfig,
    ShrinkConfig,
    StageConfig,
    SweepConfig,
)
from hf_compress.errors import (
    CompressionError,
    ConfigError,
    ExportError,
    GraphError,
    ShrinkError,
    SweepError,
    TargetError,
    TrainingError,
)
from hf_compress.export import pretrained  # noqa: F401 - imported for the loader it registers
from hf_compress.export.hub import push_to_hub
from hf_compress.export.quantized import export_quantized
from hf_compress.graph.groups import DimensionGroup, ParameterSlice
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.labels import make_labels
from hf_compress.graph.model import dimension_groups
from hf_compress.graph.op_rules import op_rule
from hf_compress.instruments.quantize import enable_quantizers
from hf_compress.latency.cache import latency_table
from hf_compress.latency.masks import fit_speedup, latency_masks, measure_speedup
from hf_compress.latency.table import LatencyTable
from hf_compress.metrics.table import load_metric
from hf_compress.oneshot.prune import OneShotResult, prune_oneshot
from hf_compress.pruning import allocate, criteria, learned  # noqa: F401 - imported for what they register
from hf_compress.ptq.calibrate import CalibrationResult, calibrate
from hf_compress.ptq.sensitivity import Sensitivity, quantization_sensitivity
from hf_compress.ptq.stored import apply_calibration_config, calibration_config
from hf_compress.quantization import methods  # noqa: F401 - imported for what it registers
from hf_compress.recipe import RunResult, SweepResult, make_callbacks, run_recipe, run_sweep
from hf_compress.report.compare import compare
from hf_compress.report.html import write_report
from hf_compress.report.profile import ModelProfile, profile
from hf_compress.search.annealing import SearchResult, simulated_annealing
from hf_compress.search.auto import AutoCompressResult, auto_compress
from hf_compress.shrinking.plan import ShrinkPlan, plan_shrink
from hf_compress.shrinking.shrink import shrink
from hf_compress.teachers.build import cache_teacher_outputs
from hf_compress.teachers.cached import TeacherCache
from hf_compress.teachers.outputs import SparseLogits, TeacherOutputs
from hf_compress.vocabulary.prune import prune_vocabulary

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Pass transformers' Auto classes on."""
    if name.startswith("Auto") and hasattr(transformers, name):
        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AnnealingConfig",
    "AutoCompressResult",
    "CalibrationResult",
    "CompressionError",
    "ConfigError",
    "DatasetConfig",
    "DimensionGroup",
    "DistillationCallback",
    "DistillationConfig",
    "ExportError",
    "FeatureConfig",
    "GraphError",
    "LatencyTable",
    "ModelProfile",
    "OneShotResult",
    "ParameterSlice",
    "ParameterSpace",
    "Preview",
    "PruningCallback",
    "PruningConfig",
    "PruningRule",
    "QuantizationCallback",
    "QuantizationConfig",
    "QuantizationRule",
    "Ramp",
    "Recipe",
    "RunResult",
    "SearchConfig",
    "SearchResult",
    "Sensitivity",
    "ShrinkConfig",
    "ShrinkError",
    "ShrinkPlan",
    "SparseLogits",
    "StageConfig",
    "SweepConfig",
    "SweepError",
    "SweepResult",
    "TargetError",
    "TeacherCache",
    "TeacherOutputs",
    "TrainingError",
    "apply_calibration_config",
    "auto_compress",
    "cache_teacher_outputs",
    "calibrate",
    "calibration_config",
    "compare",
    "dimension_groups",
    "enable_quantizers",
    "export_quantized",
    "fit_speedup",
    "last_complete_checkpoint",
    "latency_masks",
    "latency_table",
    "load_metric",
    "make_callbacks",
    "make_example_inputs",
    "make_labels",
    "measure_speedup",
    "op_rule",
    "plan_shrink",
    "preview",
    "profile",
    "prune_oneshot",
    "prune_vocabulary",
    "push_to_hub",
    "quantization_sensitivity",
    "run_recipe",
    "run_sweep",
    "shrink",
    "simulated_annealing",
    "write_report",
]
