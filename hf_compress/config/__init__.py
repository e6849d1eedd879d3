"""What a user writes: frozen, validated on construction, stored as JSON or YAML."""

from hf_compress.config.base import SCHEMA_VERSION, Config
from hf_compress.config.data import DatasetConfig
from hf_compress.config.methods import (
    STRUCTURES,
    TRAINABLE_STRUCTURES,
    DistillationConfig,
    PruningConfig,
    QuantizationConfig,
)
from hf_compress.config.recipe import TASKS, Recipe, ShrinkConfig
from hf_compress.config.stages import StageConfig

__all__ = [
    "SCHEMA_VERSION",
    "STRUCTURES",
    "TASKS",
    "TRAINABLE_STRUCTURES",
    "Config",
    "DatasetConfig",
    "DistillationConfig",
    "PruningConfig",
    "QuantizationConfig",
    "Recipe",
    "ShrinkConfig",
    "StageConfig",
]
