"""Execute a plan on a copy of the model: silence pruned units, slice parameters."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import ShrinkError
from hf_compress.graph.blocks import empty_block
from hf_compress.graph.capture import forget_caches
from hf_compress.graph.integers import Attribute, write
from hf_compress.graph.multihead import loosen
from hf_compress.instruments.attach import detach_all
from hf_compress.instruments.sharded import unsharded
from hf_compress.shrinking.plan import Positions, ShrinkPlan
from hf_compress.shrinking.sizes import refresh_sizes


def plain_copy(model: PreTrainedModel, *, share_weights: bool = False) -> PreTrainedModel:
    """Return a deep copy without gradients and without anything attached to it; the model keeps both.

    A forward that was replaced on the instance is not copied: wrappers (autocast in mixed precision, fused heads) hold
    on to the original, whose weights the copy would compute with. Of a model that FSDP has sharded, the copy is whole;
    every process has to ask for it.

    Args:
        model: The model.
        share_weights: Let the copy have parameters of its own, but the model's memory for them, which it must not
            write to. Slicing replaces what it cuts, and so costs the memory of what is left alone.
    """
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None  # would be copied, and would keep the old shape
        with unsharded(model, weights=True):
            shared = model.parameters() if share_weights else ()
            duplicate = copy.deepcopy(model, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in shared})
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
    for name in ("forward", "_original_forward"):  # the latter is what accelerate keeps to undo the former
        vars(duplicate).pop(name, None)
    detach_all(duplicate)
    forget_caches(duplicate)
    return duplicate


@torch.no_grad()
def silence(model: nn.Module, zero: Positions) -> None:
    """Zero the weights that consume pruned units, in place: exactly what a gate of 0 at their input does.

    Args:
        model: A model of the original sizes.
        zero: Parameter name -> dimension -> positions.
    """
    parameters = dict(model.named_parameters())
    for name, dims in zero.items():
        for dim, positions in dims.items():
            where = torch.tensor(positions, device=parameters[name].device)
            parameters[name].index_fill_(dim, where, 0.0)


@torch.no_grad()
def slice_in_place(model: PreTrainedModel, plan: ShrinkPlan) -> None:
    """Cut every parameter and buffer of ``model`` to the positions that stay; identity and tying are kept.

    Raises:
        ShrinkError: If the plan was made for a model of other shapes.
    """
    tensors: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    check_fits(tensors, plan)
    for name in loosened_modules(model, plan):
        loosen(model.get_submodule(name))
    for name, dims in plan.keep.items():
        tensor = tensors[name]
        data = tensor.data
        for dim, positions in dims.items():
            data = data.index_select(dim, torch.tensor(positions, dtype=torch.long, device=data.device))
        tensor.data = data.contiguous()
    for name, (output, length) in plan.emptied.items():
        empty_block(model.get_submodule(name), output, length)
    for attribute in plan.attributes:
        write(model, Attribute(attribute.module, attribute.path), attribute.value)
    refresh_sizes(model)


def loosened_modules(model: nn.Module, plan: ShrinkPlan) -> list[str]:
    """Return the names of PyTorch's own attention modules whose parameters the plan cuts."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    return [name for name in names if any(cut.startswith(f"{name}.") for cut in plan.keep)]


def check_fits(tensors: Mapping[str, Tensor], plan: ShrinkPlan) -> None:
    """Check that every position of the plan exists.

    Raises:
        ShrinkError: If a parameter is missing or too small.
    """
    for part in (plan.keep, plan.zero):
        for name, dims in part.items():
            if name not in tensors:
                raise ShrinkError(f"plan: the model has no parameter {name!r}; the plan is for {plan.model_class}.")
            shape = tuple(tensors[name].shape)
            for dim, positions in dims.items():
                if dim >= len(shape) or min(positions, default=0) < 0 or max(positions, default=-1) >= shape[dim]:
                    raise ShrinkError(
                        f"plan: positions of {name!r} along dimension {dim} do not fit its shape {shape}; the plan was "
                        f"made for a {plan.model_class} of other sizes."
                    )
