"""Where the channels of a tensor can be scaled, and unscaled by those that read it, without any change of the function.

The recorded forward pass says who reads a tensor and what made it. A norm's weight and bias, or the rows of a linear
layer, may be divided by positive factors when the columns of all readers are multiplied by them: if all readers are
linear layers, and nothing but ReLU (f(s x) = s f(x)) and products with other tensors lie between.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from hf_compress.errors import TargetError
from hf_compress.graph.capture import Capture, capture
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.instruments.attach import find_leaf_kind
from hf_compress.oneshot.linear import LinearLayer, Undo, linear_layer

HOMOGENEOUS = frozenset(
    {"view", "_unsafe_view", "reshape", "clone", "detach", "alias", "_to_copy", "contiguous", "relu", "unsqueeze"}
)
"""ATen operators that let positive factors of channels through."""

PRODUCT = "mul"


@dataclass(frozen=True, eq=False)
class Fold:
    """What makes a tensor, and all that reads it."""

    name: str
    """Of the module that makes it."""

    norm: nn.Module | None
    """A norm with one weight, and maybe a bias, for each channel; None: the producer is linear."""

    linear: LinearLayer | None
    """The producer, if it is a linear layer."""

    readers: Sequence[LinearLayer]

    offset: float = 0.0
    """What the norm adds to its weight before it multiplies: 1 in Gemma."""

    @torch.no_grad()
    def apply(self, factors: Tensor, undo: Undo) -> Tensor:
        """Divide what is made by the factors, and multiply the columns of the readers by them.

        Args:
            factors: Positive, float32 [channels].
            undo: Told what changes.

        Returns:
            The factors that were used: in half precision powers of two, by which every weight is multiplied exactly.
        """
        producer = self.norm if self.linear is None else self.linear.module
        assert producer is not None
        if producer.get_parameter("weight").dtype not in (torch.float32, torch.float64):
            factors = factors.log2().round().exp2()
        for parameter in producer.parameters(recurse=False):
            rows = self.linear is not None and parameter.dim() == 2 and self.linear.kind.weight_in_dim == 1
            here = factors.to(parameter.device)
            undo.remember(parameter)
            offset = self.offset if parameter is producer.get_parameter("weight") else 0.0
            parameter.copy_((parameter + offset) / (here[:, None] if rows else here) - offset)
        for reader in self.readers:
            undo.remember(reader.parameter)
            reader.parameter.copy_(reader.as_stored(reader.weight() * factors.to(reader.parameter.device)))
        return factors


class FoldFinder:
    """Looks for folds in one recorded forward pass.

    Args:
        model: In eval mode, without anything attached.

    Raises:
        GraphError: If the forward pass cannot be recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._recorded: Capture = capture(model, make_example_inputs(model))
        self._count = Counter(call.module for call in self._recorded.calls)
        self._makers: dict[fx.Node, list[str]] = {}
        self._readers: dict[fx.Node, list[str]] = {}
        for call in self._recorded.calls:
            if len(call.outputs) == 1 and call.outputs[0] is not None:
                self._makers.setdefault(call.outputs[0], []).append(call.module)
            if call.inputs and call.inputs[0] is not None and self._is_linear(call.module):
                self._readers.setdefault(call.inputs[0], []).append(call.module)

    def find(self, names: Collection[str], *, norms: bool) -> Iterator[Fold]:
        """Yield the folds of tensors that some layers read, in the order of the forward pass.

        Args:
            names: Layers, one of which has to be among the readers.
            norms: What makes the tensors: norms, or linear layers.
        """
        for node, readers in self._readers.items():
            if not any(name in names for name in readers) or not self._read_by(node, readers):
                continue
            maker = self._maker(node, norms=norms)
            try:
                layers = [linear_layer(self.model, name, "ptq") for name in readers]
                linear = None if maker is None or norms else linear_layer(self.model, maker, "ptq")
            except TargetError:  # a weight that others share
                continue
            if maker is not None and norms:
                norm = self.model.get_submodule(maker)
                yield Fold(maker, norm, None, layers, _offset(norm, _channels(node)) or 0.0)
            elif maker is not None:
                yield Fold(maker, None, linear, layers)

    def _is_linear(self, name: str) -> bool:
        if self._count[name] != 1:
            return False
        kind = find_leaf_kind(self.model.get_submodule(name))
        return kind is not None and kind.is_linear

    def _read_by(self, node: fx.Node, readers: list[str]) -> bool:
        """Whether nothing else reads a tensor."""
        return all(user.meta.get("module") in readers for user in node.users)

    def _maker(self, node: fx.Node, *, norms: bool) -> str | None:
        """Return the norm, or the linear layer, that alone makes a tensor up to factors of its channels."""
        for name in self._makers.get(node, []):
            if self._is_norm(name, _channels(node)) if norms else self._is_linear(name):
                return name
        kind = getattr(getattr(node.target, "overloadpacket", None), "__name__", None)
        before = [each for each in node.args if isinstance(each, fx.Node)]
        if kind in HOMOGENEOUS and len(before) == 1:
            candidates = before
        elif kind == PRODUCT and not norms and len(set(before)) == 2:
            candidates = [each for each in before if each.meta["shape"] == node.meta["shape"]]
        else:
            return None
        alone = (each for each in candidates if set(each.users) == {node} and _channels(each) == _channels(node))
        return next((found for each in alone if (found := self._maker(each, norms=norms)) is not None), None)

    def _is_norm(self, name: str, channels: int) -> bool:
        module = self.model.get_submodule(name)
        own = dict(module.named_parameters())
        if self._count[name] != 1 or "weight" not in own or not own.keys() <= {"weight", "bias"}:
            return False
        if any(parameter.shape != (channels,) for parameter in own.values()) or self._is_shared(module):
            return False
        return _offset(module, channels) is not None

    def _is_shared(self, module: nn.Module) -> bool:
        own = {id(parameter) for parameter in module.parameters()}
        others = (each for each in self.model.modules() if each is not module)
        return any(id(parameter) in own for each in others for parameter in each.parameters(recurse=False))


def _channels(node: fx.Node) -> int:
    shape = node.meta["shape"]
    return shape[-1] if shape and isinstance(shape[-1], int) else -1


def _offset(norm: nn.Module, channels: int) -> float | None:
    """Return what a norm adds to its weight, or None if its output is not proportional to weight (and bias) at all.

    1 + weight, as in Gemma, cannot be divided exactly in half precision.
    """
    exact = norm.get_parameter("weight").dtype in (torch.float32, torch.float64)
    return next((each for each in ((0.0, 1.0) if exact else (0.0,)) if _scales(norm, channels, each)), None)


@torch.no_grad()
def _scales(norm: nn.Module, channels: int, offset: float) -> bool:
    """Try whether the output is divided by what weight and bias are divided by."""
    own = dict(norm.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, channels, generator=generator).to(own["weight"])
    factors = torch.randint(1, 4, (channels,), generator=generator).to(x).exp2()  # exact in every dtype
    try:
        plain = norm(x)
        for name, parameter in own.items():
            added = offset if name == "weight" else 0.0
            parameter.copy_((parameter + added) / factors - added)
        scaled = norm(x)
        return isinstance(plain, Tensor) and torch.allclose(scaled * factors, plain, rtol=1e-3, atol=1e-5)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # needs other inputs: no plain norm
        return False
    finally:
        for name, parameter in own.items():
            parameter.copy_(before[name])


def check_unchanged(before: Sequence[Tensor], after: Sequence[Tensor], what: str) -> None:
    """Check that outputs are the same up to rounding.

    Args:
        before: Outputs of the model as it was.
        after: Outputs of the model as it is.
        what: What has changed the weights, for the message.

    Raises:
        TargetError: If not.
    """
    for one, other in zip(before, after, strict=True):
        if not one.is_floating_point() or one.numel() == 0:
            continue
        tolerance = 1e-3 if one.dtype in (torch.float32, torch.float64) else 5e-2
        error = float((one.float() - other.float()).abs().max() / one.float().abs().max().clamp_min(1e-30))
        if math.isnan(error) or error > tolerance:
            raise TargetError(
                f"calibrate: {what} changed the outputs of the model by {error:.1e} (relative), though it should not. "
                f"The model is as it was; leave {what} out for it."
            )
