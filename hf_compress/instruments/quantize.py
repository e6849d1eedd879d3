"""The quantizers of a model's layers, made from a config."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from hf_compress.config import QuantizationConfig
from hf_compress.config.formats import LayerFormats
from hf_compress.errors import TargetError, choices
from hf_compress.instruments.adapters import base_layer, effective_weight, named_plain_modules
from hf_compress.instruments.attach import attach, attachment_of, leaf_kind
from hf_compress.instruments.fake_quantize import (
    check_fake_quantizable,
    is_fake_quantized,
    remove_fake_quantizers,
)
from hf_compress.quantization.methods import Method
from hf_compress.quantization.quantizers import (
    DorefaGradientQuantizer,
    LearnedQuantizer,
    ObservedQuantizer,
    Quantizer,
)
from hf_compress.registry import quantization_methods


@dataclass(eq=False)
class QuantizedLayer:
    """One layer and its quantizers."""

    name: str
    module: nn.Module
    weights: Quantizer | None = None
    inputs: Quantizer | None = None
    outputs: Quantizer | None = None
    gradient: Quantizer | None = None
    """Acts on the output for the sake of its gradient."""

    def quantizers(self) -> Iterator[tuple[str, Quantizer]]:
        """Yield role and quantizer of each tensor that is quantized."""
        for role in LayerFormats.ROLES:
            quantizer = getattr(self, role)
            if quantizer is not None:
                yield role, quantizer


@dataclass(eq=False)
class Quantized:
    """The quantizers of a model."""

    layers: list[QuantizedLayer] = field(default_factory=list)

    def named(self) -> dict[str, Quantizer]:
        """Return the quantizers as ``<layer>|<role>``."""
        return {f"{layer.name}|{role}": each for layer in self.layers for role, each in layer.quantizers()}

    def observed(self) -> dict[str, ObservedQuantizer]:
        """Return those whose range is observed."""
        return {name: each for name, each in self.named().items() if isinstance(each, ObservedQuantizer)}

    def learned(self) -> dict[str, LearnedQuantizer]:
        """Return those that learn steps."""
        return {name: each for name, each in self.named().items() if isinstance(each, LearnedQuantizer)}

    def remove(self) -> None:
        """Take the quantizers off their layers; gates stay."""
        for layer in self.layers:
            remove_fake_quantizers(layer.module)

    def enable(self, enabled: bool) -> None:
        """Let all quantizers act, or none."""
        for layer in self.layers:
            for _, quantizer in layer.quantizers():
                quantizer.enabled = enabled
            if layer.gradient is not None:
                layer.gradient.enabled = enabled

    def install(self) -> None:
        """Put the quantizers on their layers.

        Raises:
            TargetError: If a layer has some already, or cannot have any; no layer was changed.
        """
        check_fake_quantizable({layer.name: layer.module for layer in self.layers})
        for layer in self.layers:
            # The layer inside an adapted one is idle until the adapter is merged and taken off.
            for module in dict.fromkeys((layer.module, base_layer(layer.module))):
                attachment = attach(layer.name, module)
                attachment.input_quantizer, attachment.weight_quantizer = layer.inputs, layer.weights
                outputs = (layer.outputs, layer.gradient)
                attachment.output_quantizers[:] = [each for each in outputs if each is not None]


def make_quantizers(config: QuantizationConfig, modules: Mapping[str, nn.Module]) -> Quantized:
    """Make the quantizers of layers; nothing is installed.

    Args:
        config: Formats, rules, method.
        modules: Layers by name, see ``quantizable_layers``.

    Raises:
        TargetError: If a rule is for no layer, or the weight of a layer cannot be divided as its format says.
    """
    method: Method = quantization_methods.get(config.method)(config.method_options())
    formats = _formats(config, list(modules))
    layers = []
    for name, module in modules.items():
        wanted = formats[name]
        if wanted.is_empty():
            continue
        layer = QuantizedLayer(name, module)
        if wanted.weights is not None:
            layer.weights = method.weight(wanted.weights)
            layer.gradient = method.output_gradient()
            _check_shape(name, module, layer.weights)
        layer.inputs = None if wanted.inputs is None else method.activation(wanted.inputs)
        layer.outputs = None if wanted.outputs is None else method.activation(wanted.outputs)
        for role, quantizer in layer.quantizers():
            quantizer.format, quantizer.method = getattr(wanted, role), config.method
        layers.append(layer)
    if not layers:
        raise TargetError("quantization: the rules leave no layer to quantize. Let a rule leave something.")
    return Quantized(layers)


def attached_quantizers(model: nn.Module) -> Quantized:
    """Return the quantizers that are on the layers of a model, in its order."""
    layers = []
    for name, module in named_plain_modules(model):
        attachment = attachment_of(module)
        if attachment is not None and is_fake_quantized(module):
            acting = [each for each in attachment.output_quantizers if not isinstance(each, DorefaGradientQuantizer)]
            outputs = acting[0] if acting else None
            weights, inputs = attachment.weight_quantizer, attachment.input_quantizer
            layers.append(QuantizedLayer(name, module, weights, inputs, outputs))
    return Quantized(layers)


def oriented_weight(name: str, module: nn.Module) -> nn.Parameter:
    """Return a layer's weight as [outputs, inputs...], adapters merged."""
    weight: nn.Parameter = leaf_kind(name, module).oriented(effective_weight(module))  # type: ignore[assignment]
    return weight


def _formats(config: QuantizationConfig, names: list[str]) -> dict[str, LayerFormats]:
    formats = dict.fromkeys(names, config.formats())
    decided: set[str] = set()
    for rule, changed in zip(config.parsed_rules(), config.rule_formats(), strict=True):
        matched = {name for name in names if any(re.search(pattern, name) for pattern in rule.match)}
        if not matched:
            known = choices(rule.match[0], {re.sub(r"\.\d+\.", ".N.", name) for name in names})
            raise TargetError(f"QuantizationRule.match: {list(rule.match)} matches no quantized layer; {known}.")
        if matched <= decided:
            raise TargetError(
                f"QuantizationRule.match: {list(rule.match)} matches only layers that earlier rules decide about, so "
                "the rule has no effect. Put it first, or drop it."
            )
        formats.update(dict.fromkeys(matched - decided, changed))
        decided |= matched
    return formats


def _check_shape(name: str, module: nn.Module, quantizer: Quantizer) -> None:
    weight = oriented_weight(name, module)
    if quantizer.granularity.kind == "group" and weight.dim() != 2:
        raise TargetError(
            f"quantization: the weight of {name!r} has {weight.dim()} dimensions; groups are of the inputs of a "
            "matrix. Use granularity 'channel' for it, by a rule."
        )
    try:
        quantizer.granularity.num_blocks(weight.shape)
    except TargetError as error:
        raise TargetError(f"{name!r}: {error}") from error
