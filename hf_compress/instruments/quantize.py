"""The quantizers of a model's layers, made from a config."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from hf_compress.config import QuantizationConfig
from hf_compress.config.formats import LayerFormats, TensorFormat
from hf_compress.config.quantization import TARGETS, changes_of
from hf_compress.errors import TargetError, choices
from hf_compress.instruments.adapters import base_layer, named_plain_modules
from hf_compress.instruments.attach import attach, attachment_of
from hf_compress.instruments.attention_tap import let_attention_change
from hf_compress.instruments.fake_quantize import (
    check_fake_quantizable,
    is_fake_quantized,
    remove_fake_quantizers,
)
from hf_compress.instruments.parameters import OnParameter
from hf_compress.instruments.targets import (
    ATTENDED,
    LEAVES,
    PROBABILITIES,
    oriented_weight,
    owned_parameter,
    parameter_name,
    target_of,
)
from hf_compress.quantization.methods import Method
from hf_compress.quantization.own_grids import DorefaGradientQuantizer
from hf_compress.quantization.quantizers import LearnedQuantizer, ObservedQuantizer, Quantizer
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
        """Return the quantizers as ``<layer>|<role>``; that of a tied weight once, under its first name."""
        found: dict[Quantizer, str] = {}
        for layer in self.layers:
            for role, each in layer.quantizers():
                found.setdefault(each, f"{layer.name}|{role}")
        return {name: each for each, name in found.items()}

    def weighted(self) -> list["QuantizedLayer"]:
        """Return the layers whose weight is quantized; of those with a tied weight the first."""
        return list({layer.weights: layer for layer in reversed(self.layers) if layer.weights is not None}.values())[
            ::-1
        ]

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
            _INSTALL[target_of(layer.name, layer.module)](layer)


def _on_leaf(layer: QuantizedLayer) -> None:
    # The layer inside an adapted one is idle until the adapter is merged and taken off.
    for module in dict.fromkeys((layer.module, base_layer(layer.module))):
        attachment = attach(layer.name, module)
        attachment.input_quantizer, attachment.weight_quantizer = layer.inputs, layer.weights
        outputs = (layer.outputs, layer.gradient)
        attachment.output_quantizers[:] = [each for each in outputs if each is not None]


def _on_parameter(layer: QuantizedLayer) -> None:
    assert layer.weights is not None
    on_parameter = OnParameter(layer.module, parameter_name(layer.name, layer.module), layer.weights)
    attach(layer.name, layer.module).parameter_quantizers.append(on_parameter)


def _on_attention(layer: QuantizedLayer) -> None:
    assert layer.inputs is not None
    let_attention_change()
    attach(layer.name, layer.module).attention_quantizers[layer.name.rpartition(".")[2]] = layer.inputs


_INSTALL: dict[str, Callable[[QuantizedLayer], None]] = {
    **dict.fromkeys(LEAVES, _on_leaf),
    "embedding": _on_parameter,
    "experts": _on_parameter,
    "attention": _on_attention,
    PROBABILITIES: _on_attention,
}


def make_quantizers(config: QuantizationConfig, modules: Mapping[str, nn.Module]) -> Quantized:
    """Make the quantizers of layers; nothing is installed.

    Args:
        config: Formats, rules, method.
        modules: Layers by name, see ``quantizable_layers``.

    Raises:
        TargetError: If a rule is for no layer, or the weight of a layer cannot be divided as its format says.
    """
    method: Method = quantization_methods.get(config.method)(config.method_options())
    formats = _formats(config, modules)
    tied: dict[int, tuple[str, TensorFormat, Quantizer]] = {}
    layers = []
    for name, module in modules.items():
        wanted = formats[name]
        if wanted.is_empty():
            continue
        layer = QuantizedLayer(name, module)
        if wanted.weights is not None:
            known = tied.setdefault(
                id(owned_parameter(name, module)), (name, wanted.weights, method.weight(wanted.weights))
            )
            _check_same(name, wanted.weights, known)
            layer.weights = known[2]
            layer.gradient = method.output_gradient() if target_of(name, module) in LEAVES else None
            _check_shape(name, module, layer.weights)
        layer.inputs = None if wanted.inputs is None else method.activation(wanted.inputs)
        layer.outputs = None if wanted.outputs is None else method.activation(wanted.outputs)
        for role, quantizer in layer.quantizers():
            quantizer.format, quantizer.method = getattr(wanted, role), config.method
        layers.append(layer)
    if not layers:
        raise TargetError("quantization: the rules leave no layer to quantize. Let a rule leave something.")
    return Quantized(layers)


def _check_same(name: str, wanted: TensorFormat, known: tuple[str, TensorFormat, Quantizer]) -> None:
    first, its, _ = known
    if wanted != its:
        raise TargetError(
            f"quantization: {first!r} and {name!r} have one weight, but rules give it two formats ({its} and "
            f"{wanted}). Let one rule match both."
        )


def attached_quantizers(model: nn.Module) -> Quantized:
    """Return the quantizers that are on the layers of a model, in its order."""
    layers = []
    for name, module in named_plain_modules(model):
        attachment = attachment_of(module)
        if attachment is None or not is_fake_quantized(module):
            continue
        acting = [each for each in attachment.output_quantizers if not isinstance(each, DorefaGradientQuantizer)]
        leaf = (attachment.weight_quantizer, attachment.input_quantizer, acting[0] if acting else None)
        if any(leaf):
            layers.append(QuantizedLayer(name, module, *leaf))
        for on_parameter in attachment.parameter_quantizers:
            full = name if on_parameter.name == "weight" else f"{name}.{on_parameter.name}"
            layers.append(QuantizedLayer(full, module, on_parameter.quantizer))
        for part in (*ATTENDED, PROBABILITIES):
            if part in attachment.attention_quantizers:
                inputs = attachment.attention_quantizers[part]
                layers.append(QuantizedLayer(f"{name}.{part}", module, inputs=inputs))
    return Quantized(layers)


def enable_quantizers(model: nn.Module, enabled: bool = True) -> None:
    """Let the quantizers on a model act, or none of them: then it computes in floating point, and keeps them.

    ``shrink`` returns a model whose quantizers do not act. ``export_quantized`` stores them all the same.

    Args:
        model: Any model; nothing happens without quantizers.
        enabled: Whether they act.
    """
    attached_quantizers(model).enable(enabled)


def _formats(config: QuantizationConfig, modules: Mapping[str, nn.Module]) -> dict[str, LayerFormats]:
    """Return the format of each layer: what its first rule says of the tensors that its kind has."""
    names = list(modules)
    formats = dict.fromkeys(names, config.formats())
    roles = {name: TARGETS[target_of(name, module)] for name, module in modules.items()}
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
        said = {role for role, change in changes_of(rule).items() if change is not None}
        if not any(said & set(roles[name]) for name in matched):
            raise TargetError(
                f"QuantizationRule.match: {list(rule.match)} matches only layers that have no "
                f"{' or '.join(sorted(said))} to quantize, so the rule has no effect."
            )
        formats.update(dict.fromkeys(matched - decided, changed))
        decided |= matched
    return {name: LayerFormats(**{role: getattr(each, role) for role in roles[name]}) for name, each in formats.items()}


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
