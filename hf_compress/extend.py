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

from hf_compress import registry
from hf_compress.config.base import Settings
from hf_compress.config.formats import LayerFormats, TensorFormat
from hf_compress.distillation.losses import feature_loss, logits_loss, mean_over_positions
from hf_compress.graph.op_rules import OpCall, op_rule
from hf_compress.pruning import method
from hf_compress.pruning.method import (
    AveragedMethod,
    DeferringMethod,
    Evidence,
    MethodOptions,
    averaged_criterion,
    criterion_of_weights,
)
from hf_compress.quantization import methods
from hf_compress.quantization.grid import Grid
from hf_compress.quantization.methods import Qat, granularity_of, grid_of
from hf_compress.quantization.observers import Observer
from hf_compress.quantization.quantizers import LearnedQuantizer, ObservedQuantizer, Quantizer, RangeQuantizer

CriterionMethod = method.Method
"""One criterion at work: state, options, what it reads. See ``hf_compress.pruning.method.Method``."""

QuantizationMethod = methods.Method
"""Which quantizer each tensor gets. See ``hf_compress.quantization.methods.Method``."""

allocators = registry.allocators
"""Ways to spread a sparsity over layers, by name."""

criteria = registry.criteria
"""Pruning criteria, by name: subclasses of ``CriterionMethod``."""

observers = registry.observers
"""Ways to choose a quantization range from tensors, by name: subclasses of ``Observer``."""

quantization_methods = registry.quantization_methods
"""How steps and values are found, by name: subclasses of ``QuantizationMethod``."""

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
