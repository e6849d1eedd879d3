"""What is attached to one module, and in which order it acts."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_compress.quantization.quantizers import Quantizer


class InputGate(Protocol):
    """Returns one factor per input channel, [in_features]; differentiable with respect to the gate."""

    def __call__(self) -> Tensor: ...  # noqa: D102


class ParameterGate(Protocol):
    """Returns what stands in for the parameter ``name`` of the module ``owner`` while another module, or it, runs."""

    owner: nn.Module
    name: str

    def __call__(self, parameter: Tensor) -> Tensor: ...  # noqa: D102


class WeightMask(Protocol):
    """Returns the weight with zeros where it is pruned."""

    def __call__(self, weight: Tensor) -> Tensor: ...  # noqa: D102

    def tensor(self, device: torch.device) -> Tensor:
        """Return the mask, for autograd to check that it is the same in the backward pass."""
        ...


class CallTransform(Protocol):
    """Called instead of a module's forward, with the module, that forward, and the arguments."""

    def __call__(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any: ...  # noqa: D102


class QuantizedParameter(ParameterGate, Protocol):
    """Returns what stands in for a parameter: its values on a grid."""

    quantizer: Quantizer


@dataclass(eq=False)
class Attachment:
    """What is attached to one module, in the order in which it acts.

    Gates and masks come first, so that quantizers see what a physically smaller layer would see: removed channels
    are zeros in the input and are hidden from the weight's scale, and pruned weights are zeros.
    """

    base: type[nn.Module]
    """The class that the module had before."""

    input_gates: list[InputGate] = field(default_factory=list)
    """Each gives factors [in_features]; the input is multiplied by all of them."""

    recorders: list[Callable[[Tensor], None]] = field(default_factory=list)
    """Watch the input as it comes, before any gate, while the module trains."""

    input_quantizer: Quantizer | None = None
    """Fake-quantizes the gated input, [..., in_features]."""

    weight_mask: WeightMask | None = None
    """Applied to the weight."""

    weight_quantizer: Quantizer | None = None
    """Fake-quantizes the masked weight; it is told which inputs are removed."""

    output_quantizers: list[Quantizer] = field(default_factory=list)
    """Act on the output, one after the other."""

    parameter_gates: list[ParameterGate] = field(default_factory=list)
    """Change parameters while the module runs: the only way into those that are not read by a leaf module."""

    parameter_quantizers: list[QuantizedParameter] = field(default_factory=list)
    """Act on parameters after the gates: tables of embeddings, weights of experts."""

    attention_quantizers: dict[str, Quantizer] = field(default_factory=dict)
    """Act on what an attention module attends with: ``"queries"``, ``"keys"``, ``"values"``, ``"probabilities"``."""

    subset: CallTransform | None = None
    """Runs the module on the kept units alone."""

    layer: CallTransform | None = None
    """Mixes what the module returns with what it was given."""

    final_gates: list[Any] = field(default_factory=list)
    """Those gates that a finished run left, because weights alone do not say what is gone."""

    def gates(self) -> list[Any]:
        """Return whatever switches units off."""
        transforms = [each for each in (self.subset, self.layer) if each is not None]
        return [*self.input_gates, *self.parameter_gates, *transforms]

    def is_empty(self) -> bool:
        """Return whether nothing is attached any more."""
        on_parameters = self.parameter_gates or self.parameter_quantizers
        return not (self.acts_on_leaf() or on_parameters or self.attention_quantizers or self.subset or self.layer)

    def acts_on_leaf(self) -> bool:
        """Return whether input or weight of a leaf module pass through something."""
        changes_input = bool(self.input_gates) or self.input_quantizer is not None
        return changes_input or bool(self.recorders or self.output_quantizers) or self.changes_weight()

    def changes_weight(self) -> bool:
        """Return whether a leaf module computes with another weight."""
        return self.weight_mask is not None or self.weight_quantizer is not None

    def clear(self) -> None:
        """Take everything off."""
        self.input_gates.clear()
        self.recorders.clear()
        self.parameter_gates.clear()
        self.clear_quantizers()
        self.weight_mask = self.subset = self.layer = None

    def quantizers(self) -> list[Quantizer]:
        """Return all quantizers."""
        given = [self.input_quantizer, self.weight_quantizer, *self.output_quantizers]
        given += [each.quantizer for each in self.parameter_quantizers]
        return [each for each in (*given, *self.attention_quantizers.values()) if each is not None]

    def clear_quantizers(self) -> None:
        """Take all quantizers off."""
        self.input_quantizer = self.weight_quantizer = None
        self.output_quantizers.clear()
        self.parameter_quantizers.clear()
        self.attention_quantizers.clear()

    def factors(self) -> Tensor | None:
        """Return the product of all input gates, [in_features], or None without gates."""
        product: Tensor | None = None
        for gate in self.input_gates:
            product = gate() if product is None else product * gate()
        return product
