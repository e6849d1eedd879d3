"""What a user writes: frozen, validated on construction, stored as JSON or YAML."""

from hf_compress.config.annealing import AnnealingConfig
from hf_compress.config.base import SCHEMA_VERSION, Config
from hf_compress.config.data import DatasetConfig
from hf_compress.config.distillation import DistillationConfig, FeatureConfig, Ramp
from hf_compress.config.formats import LayerFormats, TensorFormat
from hf_compress.config.pruning import PruningConfig
from hf_compress.config.quantization import QuantizationConfig, QuantizationRule
from hf_compress.config.recipe import Recipe, ShrinkConfig
from hf_compress.config.rules import PruningRule
from hf_compress.config.search import ParameterSpace, SearchConfig
from hf_compress.config.stages import StageConfig
from hf_compress.config.structures import STRUCTURES, TRAINABLE_STRUCTURES, WEIGHTS, WIDTHS
from hf_compress.config.sweep import SweepConfig
from hf_compress.config.tasks import TASKS

__all__ = [
    "SCHEMA_VERSION",
    "STRUCTURES",
    "TASKS",
    "TRAINABLE_STRUCTURES",
    "WEIGHTS",
    "WIDTHS",
    "AnnealingConfig",
    "Config",
    "DatasetConfig",
    "DistillationConfig",
    "FeatureConfig",
    "LayerFormats",
    "ParameterSpace",
    "PruningConfig",
    "PruningRule",
    "QuantizationConfig",
    "QuantizationRule",
    "Ramp",
    "Recipe",
    "SearchConfig",
    "ShrinkConfig",
    "StageConfig",
    "SweepConfig",
    "TensorFormat",
]
