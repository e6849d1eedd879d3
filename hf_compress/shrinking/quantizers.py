"""Move fake quantizers from a model to the smaller one that was cut out of it.

Steps that are stored follow what they belong to. Per tensor they stay; per channel those of the outputs that are left
are kept; per group (``group_size`` inputs of one output) those of whole groups are kept, and where inputs were cut
otherwise, so that new groups mix the inputs of several, learned and calibrated steps are computed again from the
weights. Ranges that are those of the tensor itself need nothing: removed units do not count in them.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_compress.errors import ShrinkError, TargetError
from hf_compress.instruments.attach import leaf_kind
from hf_compress.instruments.quantize import Quantized, QuantizedLayer
from hf_compress.instruments.sharded import whole
from hf_compress.instruments.targets import LEAVES, oriented_weight, owned_parameter, sites, target_of
from hf_compress.quantization.quantizers import LearnedQuantizer, Quantizer, RangeQuantizer
from hf_compress.shrinking.depth import renamed


@dataclass(frozen=True)
class Cut:
    """What a weight loses, as [outputs, inputs...]."""

    shape: tuple[int, ...]
    """Before."""

    outputs: Tensor
    """Outputs that stay, ascending."""

    inputs: Tensor
    """Inputs that stay, ascending."""


def cuts(model: nn.Module, quantized: Quantized, keep: Mapping[str, Mapping[int, list[int]]]) -> dict[str, Cut]:
    """Return what each layer's weight loses, by name.

    Args:
        model: The plain model before it is cut, adapters merged.
        quantized: The quantizers of the original.
        keep: Parameter -> dimension -> positions that stay, see ``ShrinkPlan.keep``; what is not there stays whole.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for layer, module in _places(model, quantized, {}):
        parameter = owned_parameter(layer.name, module)
        if parameter is not None:
            found[layer.name] = _cut(layer.name, module, parameter, keep.get(names[id(parameter)], {}))
    return found


def move_quantizers(
    original: Quantized, model: nn.Module, cut: Mapping[str, Cut], layers: Mapping[str, tuple[int, ...]]
) -> None:
    """Give a smaller model copies of the original's quantizers.

    Args:
        original: Quantizers of the original; they stay as they are.
        model: The smaller model, nothing attached to it.
        cut: See ``cuts``.
        layers: Lists of layers that lost some, see ``ShrinkPlan.layers``.

    Raises:
        ShrinkError: If the groups of a format do not divide the inputs that are left.
    """
    copies: dict[Quantizer, Quantizer] = {}
    moved, renewed = [], []
    for layer, module in _places(model, original, layers):
        new = QuantizedLayer(renamed(layer.name, layers) or layer.name, module)
        for role in ("weights", "inputs", "outputs", "gradient"):
            quantizer = getattr(layer, role)
            if quantizer is None:
                continue
            if quantizer not in copies:
                copies[quantizer] = copy.deepcopy(quantizer)
                if role == "weights" and _select(new, copies[quantizer], cut[layer.name]):
                    renewed.append(new.name)
            setattr(new, role, copies[quantizer])
        moved.append(new)
    Quantized(moved).install()
    if renewed:
        warnings.warn(
            f"shrink: the learned or calibrated steps of {len(renewed)} layers (first: {renewed[0]!r}) are computed "
            "again from the weights, because their groups of inputs were cut. Train on, or shrink whole groups.",
            UserWarning,
            stacklevel=3,
        )


def _cut(name: str, module: nn.Module, parameter: Tensor, keep: Mapping[int, list[int]]) -> Cut:
    kept = [torch.tensor(keep.get(dim, range(size)), dtype=torch.long) for dim, size in enumerate(parameter.shape)]
    shape = tuple(oriented_weight(name, module).shape)
    if target_of(name, module) == "experts":
        out, into = (2, 1) if module.is_transposed else (1, 2)
        return Cut(shape, (kept[0][:, None] * parameter.shape[out] + kept[out]).flatten(), kept[into])
    transposed = target_of(name, module) in LEAVES and leaf_kind(name, module).weight_in_dim == 0
    return Cut(shape, kept[1], kept[0]) if transposed else Cut(shape, kept[0], kept[1])


def _select(layer: QuantizedLayer, quantizer: Quantizer, cut: Cut) -> bool:
    """Let a quantizer be that of the smaller weight; return whether its steps were computed again."""
    weight = whole(oriented_weight(layer.name, layer.module).detach())
    granularity = quantizer.granularity
    try:
        granularity.num_blocks(weight.shape)
    except TargetError as error:
        raise ShrinkError(f"shrink: {layer.name!r} cannot stay quantized as it is: {error}") from error
    if isinstance(quantizer, RangeQuantizer) and quantizer.is_fixed and quantizer.is_own:
        quantizer.release()  # the weight has lost what may have set its range
        quantizer.fix(*quantizer.parameters(weight, quantizer.not_there(weight)), own=True)
    elif granularity.kind == "channel":
        quantizer.select(cut.outputs)
    elif granularity.kind == "group":
        groups = _whole_groups(cut, granularity.size)
        if groups is not None:
            per_row = cut.shape[1] // granularity.size
            quantizer.select((cut.outputs[:, None] * per_row + groups).flatten())
        elif isinstance(quantizer, LearnedQuantizer) and quantizer.learned:
            quantizer.initialize(weight)
            return True
        elif isinstance(quantizer, RangeQuantizer) and quantizer.is_fixed:
            quantizer.release()
            return True
    return False


def _whole_groups(cut: Cut, size: int) -> Tensor | None:
    """Return which groups of inputs are left, or None if a part of one is."""
    left = torch.zeros(cut.shape[1], dtype=torch.bool)
    left[cut.inputs] = True
    grouped = left.view(-1, size)
    return grouped.all(1).nonzero().flatten() if torch.equal(grouped.all(1), grouped.any(1)) else None


def _places(
    model: nn.Module, quantized: Quantized, layers: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[QuantizedLayer, nn.Module]]:
    """Yield layers of the original that are left, each with the module of a plain model that does the same."""
    there: dict[str, dict[str, nn.Module]] = {}
    for layer in quantized.layers:
        target = target_of(layer.name, layer.module)
        if target not in there:
            there[target] = dict(sites(model, target))
        name = renamed(layer.name, layers)
        if name in there[target]:
            yield layer, there[target][name]
