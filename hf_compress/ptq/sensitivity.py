"""How much the loss rises when a single layer is quantized, and which layers should keep more bits."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.config import QuantizationConfig, QuantizationRule
from hf_compress.errors import ConfigError, TargetError
from hf_compress.graph.capture import evaluating
from hf_compress.instruments.quantize import Quantized, QuantizedLayer
from hf_compress.instruments.targets import oriented_weight
from hf_compress.oneshot.calibration import Calibration, check_finite
from hf_compress.oneshot.prune import check_prunable
from hf_compress.ptq.calibrate import calibrate
from hf_compress.report.plots import plot_sensitivity

CALLER = "quantization_sensitivity"


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The loss of the floating-point model, and what each layer adds to it when it alone is quantized."""

    loss: float
    """Mean over the examples, of the model as it is."""

    increases: dict[str, dict[int, float]]
    """By layer and bits; below 0 where the loss falls by chance."""

    weights: dict[str, int]
    """Number of weights by layer."""

    roles: tuple[str, ...] = ("weights",)
    """Which tensors of a layer have these bits."""

    def table(self) -> str:
        """Return a line for each layer, in the order of the model."""
        bits = self._bits()
        width = max(len("layer"), *map(len, self.increases))
        lines = [f"{'layer':<{width}}  {'weights':>11}" + "".join(f"  {f'{each} bits':>10}" for each in bits)]
        for name, found in self.increases.items():
            numbers = "".join(f"  {found[each]:>+10.4f}" for each in bits)
            lines.append(f"{name:<{width}}  {self.weights[name]:>11,}{numbers}")
        what = ", ".join(self.roles)
        return "\n".join([f"loss {self.loss:.4f}; by how much it rises with the {what} of one layer in", *lines])

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings."""
        layers = {
            name: {"weights": self.weights[name], "increases": {str(bits): value for bits, value in found.items()}}
            for name, found in self.increases.items()
        }
        return {"loss": self.loss, "roles": list(self.roles), "layers": layers}

    def plot(self, path: str | Path) -> Path:
        """Draw the increases, a bar for each layer and number of bits.

        Args:
            path: File to write; the suffix chooses the format (``.png``, ``.svg``).

        Returns:
            The path.
        """
        return plot_sensitivity(self.increases, path)

    def rules(self, mean_bits: float) -> list[QuantizationRule]:
        """Return rules that give each layer bits, so that the sum of increases is small within a budget.

        All layers begin with the fewest bits; then the step up that lowers the sum most for what it costs is taken, as
        long as one fits: sensitive layers keep many bits. That the increases of layers add up is an approximation.

        Source: the greedy heuristic of knapsack problems with choices, as HAWQ-V2 uses sensitivities (Dong et al. 2020,
        arXiv:1911.03852, section 3) for bits.

        Args:
            mean_bits: The budget, in bits for each weight of these layers.

        Returns:
            For ``QuantizationConfig.rules``, a rule for each number of bits.

        Layers without a quantized weight, such as attention, cost nothing and keep the most bits.

        Raises:
            ConfigError: If fewer bits are asked for than were measured, or no layer has a quantized weight.
        """
        bits = sorted(self._bits())
        total = sum(self.weights.values())
        if total == 0:
            raise ConfigError(
                "Sensitivity.rules: no layer has a quantized weight, which mean_bits counts. Measure with weights too."
            )
        if isinstance(mean_bits, bool) or not isinstance(mean_bits, int | float) or not mean_bits >= bits[0]:
            raise ConfigError(f"Sensitivity.rules: mean_bits={mean_bits!r}; allowed: a number >= {bits[0]}.")
        chosen = {name: bits[0] if self.weights[name] else bits[-1] for name in self.increases}
        left = mean_bits * total - bits[0] * total
        while (step := self._best_step(chosen, bits, left)) is not None:
            name, more = step
            left -= (more - chosen[name]) * self.weights[name]
            chosen[name] = more
        found = {each: [name for name, its in chosen.items() if its == each] for each in reversed(bits)}
        return [
            QuantizationRule(
                match=tuple(f"^{re.escape(name)}$" for name in names),
                **{role: {"num_bits": each} for role in self.roles},
            )
            for each, names in found.items()
            if names
        ]

    def _bits(self) -> list[int]:
        return list(next(iter(self.increases.values())))

    def _best_step(self, chosen: Mapping[str, int], bits: Sequence[int], left: float) -> tuple[str, int] | None:
        """Return the layer and its new bits, by what is gained for each bit that a weight costs."""
        steps = [
            ((self.increases[name][now] - self.increases[name][more]) / cost, name, more)
            for name, now in chosen.items()
            for more in bits
            if more > now and 0 < (cost := (more - now) * self.weights[name]) <= left
        ]
        gain, name, more = max(steps, key=lambda step: step[0], default=(0.0, "", 0))
        return (name, more) if gain > 0 else None


def quantization_sensitivity(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, Any]],
    bits: Sequence[int] = (8, 4, 2),
    config: QuantizationConfig | None = None,
    *,
    num_batches: int | None = None,
) -> Sensitivity:
    """Measure how much the loss rises when only one layer is quantized: once for each layer and number of bits.

    Each process measures by itself, on the data that it is given.

    Args:
        model: Wherever it is, in whatever mode; it is left as it was.
        dataloader: Gives mappings of forward arguments with labels. The model runs over all of them once for each layer
            and number of bits.
        bits: 2 to 8.
        config: Which layers, and which tensors of them in which formats; their bits are replaced. With method
            ``"ptq"`` and without rules; None: the weights of all layers, per output channel.
        num_batches: Take no more batches than these.

    Raises:
        ConfigError: For bits that are none, or settings that have no place here.
        TargetError: If the model gives no finite loss, or what ``calibrate`` raises.
    """
    config = config or QuantizationConfig(scheme="int8_weight_only", method="ptq")
    configs = _configs(config, bits)
    check_prunable(CALLER, model, None)
    calibration = Calibration(model, dataloader, num_batches, CALLER)
    increases: dict[str, dict[int, float]] = {}
    sizes: dict[str, int] = {}
    with evaluating(model):
        loss = _loss(calibration, "Measuring the loss")
        for each, its_config in configs.items():
            result = calibrate(model, calibration.batches, its_config)
            try:
                for name, found in _one_by_one(result.quantized, calibration, each):
                    increases.setdefault(name, {})[each] = found - loss
            finally:
                result.detach()
            sizes = {layer.name: _size(layer) for layer in result.quantized.layers}
    roles = tuple(role for role in ("weights", "inputs", "outputs") if getattr(config.formats(), role) is not None)
    return Sensitivity(loss=loss, increases=increases, weights=sizes, roles=roles)


def _size(layer: QuantizedLayer) -> int:
    """Return the numbers in a layer's weight; attention has none."""
    return 0 if layer.weights is None else oriented_weight(layer.name, layer.module).numel()


def _configs(config: QuantizationConfig, bits: Sequence[int]) -> dict[int, QuantizationConfig]:
    """Return the config with each number of bits."""
    whole = isinstance(bits, Sequence) and all(type(each) is int and 2 <= each <= 8 for each in bits)
    if not whole or not bits or len(set(bits)) != len(bits):
        raise ConfigError(f"{CALLER}: bits={bits!r}; allowed: different ints from 2 to 8.")
    if config.method != "ptq" or config.options or config.rules:
        raise ConfigError(
            f"{CALLER}: config: got method {config.method!r}, options {dict(config.options)} and "
            f"{len(config.rules)} rules; allowed: 'ptq', no options, no rules. Rules are what follows from the result."
        )
    formats = config.formats()
    found = {}
    for each in bits:
        changes: dict[str, Any] = {
            role: {**(getattr(config, role) or {}), "num_bits": each}
            for role in ("weights", "inputs", "outputs")
            if getattr(formats, role) is not None
        }
        found[each] = dataclasses.replace(config, **changes)
    return found


def _one_by_one(quantized: Quantized, calibration: Calibration, bits: int) -> Iterable[tuple[str, float]]:
    """Yield the name of each layer, and the loss while it alone is quantized."""
    quantized.enable(False)
    for number, layer in enumerate(quantized.layers, 1):
        only = Quantized([layer])
        only.enable(True)
        yield layer.name, _loss(calibration, f"{bits} bits, layer {number} of {len(quantized.layers)}")
        only.enable(False)


def _loss(calibration: Calibration, doing: str) -> float:
    """Return the mean loss of all batches, by their numbers of examples."""
    total, examples = 0.0, 0
    for number, result in calibration.outputs(doing):
        loss = result.get("loss") if isinstance(result, Mapping) else None
        if loss is None:
            raise TargetError(f"{CALLER}: batch {number} gives no loss. Add labels to the batches.")
        check_finite(number, "the loss", loss, CALLER)
        tensors = (value for value in calibration.batches[number].values() if isinstance(value, Tensor) and value.dim())
        size = len(next(tensors))
        total, examples = total + float(loss) * size, examples + size
    return total / examples
