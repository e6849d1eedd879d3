"""Make the config of a shrunk model say its sizes: in stock fields if the architecture can, else for the loader."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_compress.errors import ShrinkError
from hf_compress.graph.blocks import cache_places, emptied_blocks, empty_block
from hf_compress.graph.depth import build_empty, submodule
from hf_compress.graph.integers import Attribute, read
from hf_compress.graph.multihead import FlexibleMultiheadAttention
from hf_compress.shrinking.depth import renamed
from hf_compress.shrinking.earlier import (
    all_buffers,
    all_units,
    earlier_attributes,
    size_changes,
    take_sizes,
)
from hf_compress.shrinking.plan import ShrinkPlan
from hf_compress.shrinking.sizes import (
    METHOD,
    Agrees,
    find_stock_config,
    non_persistent_buffers,
    same_floats,
    store_too,
    tensor_shapes,
)

FORMAT_VERSION = 1


def describe_sizes(
    model: PreTrainedModel, plan: ShrinkPlan, numbers: Sequence[Attribute] = (), agrees: Agrees = lambda config: True
) -> None:
    """Make the config say the new sizes.

    Args:
        model: The shrunk model; its config says how many layers there are, but still has the old widths.
        plan: The plan that was applied; names in it are those before layers went.
        numbers: Integers that forward code computes with: stock fields must leave them as they are.
        agrees: Whether the model, loaded with a config, computes what it computes now.

    Raises:
        ShrinkError: If the architecture builds other parameters than the model has, or a model that computes
            something else.
    """
    stored = take_sizes(model)
    attributes = [*earlier_attributes(stored), *(Attribute(a.module, a.path) for a in plan.attributes)]
    changed = [a for a in dict.fromkeys([*_renamed(attributes, plan), *cache_places(model)]) if _exists(model, a)]
    units = all_units(stored, plan)
    cut = all_buffers(stored, plan.keep, plan.layers)
    present = {name for name, _ in model.named_buffers()}
    buffers = {name: cut[name] for name in sorted(_made_anew(model) & present) if name in cut}
    flexible = [name for name, module in model.named_modules() if isinstance(module, FlexibleMultiheadAttention)]
    emptied = {name: list(how) for name, how in emptied_blocks(model)}
    if not buffers and not flexible and not emptied:
        stock = find_stock_config(model, [*changed, *_renamed(numbers, plan)], size_changes(model, units), agrees)
        if stock is not None:
            for name, value in stock.items():
                setattr(model.config, name, value)
            return
    uneven: dict[str, Any] = {
        "quant_method": METHOD,
        "version": FORMAT_VERSION,
        "units": units,
        "shapes": _other_shapes(model),
    }
    if emptied:
        uneven["emptied"] = emptied
    if changed:
        uneven["attributes"] = [[a.module, list(a.path), read(model, a)] for a in changed]
    if flexible:
        uneven["flexible"] = flexible
    if buffers:
        uneven["buffers"] = {name: {str(dim): kept for dim, kept in dims.items()} for name, dims in buffers.items()}
    model.config.quantization_config = uneven
    store_too(model, uneven["shapes"])
    if not agrees(model.config):
        raise ShrinkError(
            f"{type(model).__name__}: loaded again, the result would fail or compute something else: the model's code "
            "keeps a number that it made from a size. Exclude that kind of structure. The original model is untouched."
        )


def _exists(model: nn.Module, attribute: Attribute) -> bool:
    """Whether the module is still there: one that lost all of its units keeps little inside."""
    return submodule(model, attribute.module) is not None


def _made_anew(model: PreTrainedModel) -> set[str]:
    """Return the buffers that a loaded model makes anew; those that only removed layers read are not among them."""
    built = build_empty(type(model), model.config)
    return non_persistent_buffers(model if built is None else built)


def _renamed(attributes: Sequence[Attribute], plan: ShrinkPlan) -> list[Attribute]:
    names = [(renamed(a.module, plan.layers), a.path) for a in attributes]
    return [Attribute(name, path) for name, path in names if name is not None]


def _other_shapes(model: PreTrainedModel) -> dict[str, list[int]]:
    """Return the shapes that differ from what the config gives, of all that is stored."""
    built = build_empty(type(model), model.config)
    if built is not None:
        for name, how in emptied_blocks(model):
            empty_block(built.get_submodule(name), *how)
    if built is not None and not same_floats(built, model):
        raise ShrinkError(
            f"{type(model).__name__}: forward code reads a size from the model's own config, and with the new one the "
            "architecture derives other numbers (a scale of attention), so the result could not be loaded again. "
            "Exclude that structure. The original model is untouched."
        )
    theirs = _stored(built) if built is not None else {}
    ours = _stored(model)
    if theirs.keys() != ours.keys():
        different = sorted(theirs.keys() ^ ours.keys())
        raise ShrinkError(
            f"{type(model).__name__}: its config builds a model with other parameters (first difference: "
            f"{different[0] if different else 'none'!r}), so the result could not be loaded again. The original model "
            "is untouched."
        )
    larger = next((n for n, s in ours.items() if any(a > b for a, b in zip(s, theirs[n], strict=True))), None)
    if larger is not None:
        raise ShrinkError(
            f"{type(model).__name__}: its config now builds {larger!r} of shape {tuple(theirs[larger])}, less than the "
            f"{tuple(ours[larger])} that is left, so the result could not be loaded again. Exclude that kind of "
            "structure. The original model is untouched."
        )
    return {name: list(shape) for name, shape in ours.items() if theirs[name] != shape}


def _stored(model: PreTrainedModel) -> dict[str, torch.Size]:
    anew = non_persistent_buffers(model)
    return {name: shape for name, shape in tensor_shapes(model).items() if name not in anew}
