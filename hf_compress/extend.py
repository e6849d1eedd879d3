"""What extensions are made of: decorators that register a method under a name, and the classes they are given.

A registered name can be used wherever a name of this package can: in configs, in recipes, on the command line. Import
the module that registers it before. Configs store names, so a name keeps its meaning for good.

==================  ==========================================================================================
to add              write
==================  ==========================================================================================
pruning criterion   a function with ``criterion_of_weights`` or ``averaged_criterion``; for state or options of
                    its own, a ``CriterionMethod`` with ``criteria.register``
allocation          a function with ``allocators.register``, see ``hf_compress.pruning.allocate``
distillation loss   a function with ``logits_loss`` or ``feature_loss``
quantizer           a ``QuantizationMethod`` with ``quantization_methods.register``
observer            an ``Observer`` with ``observers.register``
operator            a function with ``op_rule``
==================  ==========================================================================================
"""

from hf_compress.config.base import Settings
from hf_compress.config.formats import LayerFormats, TensorFormat
from hf_compress.distillation.losses import feature_loss, logits_loss, mean_over_positions
from hf_compress.graph.op_rules import OpCall, op_rule
from hf_compress.pruning.method import (
    AveragedMethod,
    DeferringMethod,
    Evidence,
    MethodOptions,
    averaged_criterion,
    criterion_of_weights,
)
from hf_compress.pruning.method import Method as CriterionMethod
from hf_compress.quantization.grid import Grid
from hf_compress.quantization.methods import Method as QuantizationMethod
from hf_compress.quantization.methods import Qat, granularity_of, grid_of
from hf_compress.quantization.observers import Observer
from hf_compress.quantization.quantizers import LearnedQuantizer, ObservedQuantizer, Quantizer, RangeQuantizer
from hf_compress.registry import allocators, criteria, observers, quantization_methods

__all__ = [
    "AveragedMethod",
    "CriterionMethod",
    "DeferringMethod",
    "Evidence",
    "Grid",
    "LayerFormats",
    "LearnedQuantizer",
    "MethodOptions",
    "ObservedQuantizer",
    "Observer",
    "OpCall",
    "Qat",
    "QuantizationMethod",
    "Quantizer",
    "RangeQuantizer",
    "Settings",
    "TensorFormat",
    "allocators",
    "averaged_criterion",
    "criteria",
    "criterion_of_weights",
    "feature_loss",
    "granularity_of",
    "grid_of",
    "logits_loss",
    "mean_over_positions",
    "observers",
    "op_rule",
    "quantization_methods",
]
