"""Weights before and when they are rounded: ranges made more even, errors made up for."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.callbacks.ranks import elementwise, fail_together
from hf_compress.errors import TargetError
from hf_compress.graph.capture import main_outputs
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.instruments.attach import find_leaf_kind
from hf_compress.instruments.quantize import Quantized, QuantizedLayer
from hf_compress.instruments.targets import oriented_weight
from hf_compress.oneshot.calibration import Calibration
from hf_compress.oneshot.linear import LinearLayer, Undo, linear_layer
from hf_compress.pruning.obs import inverse_hessian
from hf_compress.ptq.fold import FoldFinder, check_unchanged
from hf_compress.quantization.clipping import Range
from hf_compress.quantization.equalize import corrected_bias, equalizing_factors, smooth_factors
from hf_compress.quantization.granularity import per_channel
from hf_compress.quantization.methods import PtqOptions
from hf_compress.quantization.quantizers import RangeQuantizer
from hf_compress.quantization.rounding import gptq


@dataclass(eq=False)
class InputFacts:
    """What is known about the inputs of a layer, padding left out."""

    largest: Tensor
    """max |x_j|, float32 [inputs]."""

    total: Tensor
    """Sum over tokens, float64 [inputs]."""

    count: Tensor
    """Tokens, float64 [1]."""

    def mean(self) -> Tensor:
        """Return E[x], float64 [inputs]."""
        return self.total / self.count

    def divide(self, factors: Tensor) -> None:
        """Follow a change of the model that divides the inputs."""
        self.largest, self.total = self.largest / factors, self.total / factors


@dataclass(eq=False)
class Work:
    """A model whose weights are being prepared and rounded."""

    model: nn.Module
    quantized: Quantized
    options: PtqOptions
    calibration: Calibration | None
    undo: Undo
    notes: list[str]
    """What could not be done, for the user."""

    def linear(self) -> dict[str, LinearLayer]:
        """Return the quantized layers that are products of matrices alone, by name."""
        found = ((layer, find_leaf_kind(layer.module)) for layer in self.quantized.layers)
        names = [layer.name for layer, kind in found if kind is not None and kind.is_linear]
        return {name: linear_layer(self.model, name, "calibrate") for name in names}

    def data(self) -> Calibration:
        """Return the data; only called where the config needs some."""
        assert self.calibration is not None
        return self.calibration

    def device(self) -> torch.device:
        """Return where the model is."""
        return next(self.model.parameters()).device


def prepare_weights(work: Work) -> dict[str, InputFacts]:
    """Equalize and smooth, as the options say; the real-valued model stays what it was.

    Returns:
        What is known about the inputs of linear layers, if anything needs it; by name.

    Raises:
        TargetError: If there is nothing to equalize or to smooth, data do not reach a layer, or outputs change.
        GraphError: If the model cannot be analyzed.
    """
    options = work.options
    folding = options.equalize or options.smooth is not None
    finder = FoldFinder(work.model) if folding else None
    before = _outputs(work) if folding else []
    if finder is not None and options.equalize:
        _equalize(work, finder)
    facts = _input_facts(work) if options.smooth is not None or options.bias_correction else {}
    if finder is not None and options.smooth is not None:
        _smooth(work, finder, facts, options.smooth)
    if folding:
        check_unchanged(before, _outputs(work), "smoothing or equalizing")
    return facts


def round_weights(work: Work, facts: Mapping[str, InputFacts]) -> None:
    """Fix the steps of all weights; with GPTQ put the weights on the grid, and correct biases if wanted.

    Args:
        work: The model.
        facts: Of inputs, if biases are to be corrected.

    Raises:
        TargetError: If no layer has a bias to correct, or the inputs of a layer cannot be used.
    """
    linear = work.linear() if work.options.rounding == "gptq" or work.options.bias_correction else {}
    corrected = []
    turns = _by_gptq(work, linear) if work.options.rounding == "gptq" else _to_nearest(work.quantized.layers)
    for layer, before in turns:
        if work.options.bias_correction and layer.name in linear:
            corrected.append(_correct_bias(work, layer, before, facts[layer.name]))
    if not work.options.bias_correction:
        return
    if not any(corrected):
        raise TargetError("calibrate: bias_correction: no quantized linear layer has a bias. Leave it out.")
    left = sum(layer.weights is not None for layer in work.quantized.layers) - sum(corrected)
    if left:
        work.notes.append(f"bias_correction: {left} layers have no bias, or are no linear layers; they stay")


def _correct_bias(work: Work, layer: QuantizedLayer, before: Tensor, facts: InputFacts) -> bool:
    """Correct the bias of a linear layer for the change of its weight; return whether it has one.

    Args:
        work: The model.
        layer: With a quantizer of its weight.
        before: The weight before it was rounded, [outputs, inputs].
        facts: Of its inputs.
    """
    bias = layer.module.bias
    if not isinstance(bias, nn.Parameter):
        return False
    assert layer.weights is not None
    weight = oriented_weight(layer.name, layer.module).detach()
    rounded = layer.weights.fake_quantize(weight, None, layer.weights.prepare(weight, None))
    work.undo.remember(bias)
    bias.copy_(corrected_bias(before, rounded, facts.mean().to(before.device), bias))
    return True


def _equalize(work: Work, finder: FoldFinder) -> None:
    names = [layer.name for layer in work.quantized.layers if layer.weights is not None]
    count = 0
    for fold in finder.find(names, norms=False):
        assert fold.linear is not None
        second = torch.cat([reader.weight() for reader in fold.readers])
        fold.apply(equalizing_factors(fold.linear.weight(), second), work.undo)
        count += 1
    if not count:
        raise TargetError(
            f"calibrate: equalize: {type(work.model).__name__} has no two linear layers with nothing but ReLU or a "
            "product between them. Leave it out."
        )
    work.notes.append(f"equalize: between {count} pairs of layers")


def _smooth(work: Work, finder: FoldFinder, facts: Mapping[str, InputFacts], alpha: float) -> None:
    names = [layer.name for layer in work.quantized.layers if layer.weights is not None and layer.inputs is not None]
    smoothed: set[str] = set()
    for fold in finder.find([name for name in names if name in facts], norms=True):
        known = [reader.name for reader in fold.readers if reader.name in facts]
        largest = facts[known[0]].largest  # all of them read the same
        found = smooth_factors(largest, [reader.weight().to(largest.device) for reader in fold.readers], alpha=alpha)
        factors = fold.apply(found, work.undo)
        for name in known:
            facts[name].divide(factors)
        smoothed.update(known)
    if not smoothed:
        raise TargetError(
            f"calibrate: smooth: no norm of {type(work.model).__name__} feeds linear layers alone and has a weight "
            "that could take the inverse factors (in models that add before they normalize, residuals read the norms, "
            "too; norms that add 1 to their weight can take them in float32 alone). Leave it out."
        )
    left = [name for name in names if name not in smoothed]
    if left:
        kinds = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in left))
        work.notes.append(f"smooth: {len(left)} layers are not fed by a norm alone and stay as they are: {kinds}")


def _outputs(work: Work) -> list[Tensor]:
    """Return what the model returns for the first batch, or for examples if there are no data."""
    if work.calibration is not None:
        _, result = next(work.calibration.outputs("Comparing outputs"))
    else:
        result = work.model(**make_example_inputs(work.model))
    return [output.detach().clone() for output in main_outputs(result)]


def _input_facts(work: Work) -> dict[str, InputFacts]:
    """Return the facts of all quantized linear layers, over all batches and ranks.

    Raises:
        TargetError: If data do not reach a layer.
    """
    layers = work.linear()
    facts: dict[str, InputFacts] = {}

    def read(name: str, x: Tensor) -> None:
        found = (x.abs().amax(0).float(), x.double().sum(0), x.new_tensor([len(x)], dtype=torch.float64))
        known = facts.get(name)
        if known is not None:
            found = (torch.maximum(known.largest, found[0]), known.total + found[1], known.count + found[2])
        facts[name] = InputFacts(*found)

    with fail_together(work.device()):
        calibration = work.data()
        calibration.stages(layers)
        for number, batch in calibration.each("Measuring inputs"):
            calibration.inputs_of(number, batch, layers, read)
        for name, each in facts.items():
            if not bool(torch.isfinite(each.total).all()):
                raise TargetError(f"calibrate: the inputs of {name!r} are not finite. Check the data and the weights.")
    return {
        name: InputFacts(elementwise(each.largest, "max"), *(elementwise(x, "sum") for x in (each.total, each.count)))
        for name, each in facts.items()
    }


def _to_nearest(layers: Iterable[QuantizedLayer]) -> Iterator[tuple[QuantizedLayer, Tensor]]:
    """Fix the steps of weights, and yield layers with their weights, [outputs, inputs...]."""
    for layer in layers:
        if isinstance(layer.weights, RangeQuantizer):
            weight = oriented_weight(layer.name, layer.module).detach()
            layer.weights.fix(*layer.weights.parameters(weight), own=True)
            yield layer, weight


def _by_gptq(work: Work, linear: Mapping[str, LinearLayer]) -> Iterator[tuple[QuantizedLayer, Tensor]]:
    """Round layers in the order in which they run, each on what the rounded ones before it give.

    Yields:
        Layers and their weights before, [outputs, inputs...].
    """
    weighted = {layer.name: layer for layer in work.quantized.layers if layer.weights is not None}
    chosen = {name: layer for name, layer in linear.items() if name in weighted}
    if not chosen:
        raise TargetError(
            "calibrate: options.rounding: got 'gptq'; allowed: 'nearest', since no linear layer has a quantized weight."
        )
    with fail_together(work.device()):
        stages = work.data().stages(chosen)
    for number, names in enumerate(stages, 1):
        with fail_together(work.device()):
            first = {names[0]: chosen[names[0]]}  # layers of one stage read the same
            gram = work.data().grams(first, f"Rounding layers {number} of {len(stages)}")[names[0]]
        inverse = inverse_hessian(elementwise(gram, "sum"), work.options.damping)
        for name in names:
            before = chosen[name].weight().clone()
            _round_by_gptq(work, weighted[name], chosen[name], inverse)
            yield weighted[name], before
    others = [layer for name, layer in weighted.items() if name not in chosen]
    if others:
        work.notes.append(f"gptq: {len(others)} weights that are not of linear layers are rounded to nearest")
    yield from _to_nearest(others)


def _round_by_gptq(work: Work, layer: QuantizedLayer, linear: LinearLayer, inverse: Tensor) -> None:
    quantizer = layer.weights
    assert isinstance(quantizer, RangeQuantizer)

    def choose(blocks: Tensor) -> Range:
        return RangeQuantizer(quantizer.grid, per_channel(0), quantizer.observer, quantizer.options).range(blocks)

    weight = linear.weight()
    rounded = gptq(
        weight, inverse.to(weight.device), quantizer.grid, group_size=quantizer.granularity.size, choose=choose
    )
    work.undo.remember(linear.parameter)
    linear.parameter.copy_(linear.as_stored(rounded.weight))
    zero_point = None if rounded.zero_point is None else rounded.zero_point.flatten()
    quantizer.fix(rounded.scale.flatten(), zero_point)
