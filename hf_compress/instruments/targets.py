"""What can be quantized beside the leaf layers: tables of embeddings, weights of experts, inputs of attention.

Each has a name as layers have: an embedding that of its module, a weight of experts that of the parameter; queries,
keys and values that of the attention module with ``.queries``, ``.keys`` or ``.values`` after it.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from hf_compress.errors import TargetError
from hf_compress.instruments.adapters import base_layer, effective_weight, named_plain_modules
from hf_compress.instruments.attach import find_leaf_kind, leaf_kind, own_class

LEAVES: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear, Conv1D),
    "convolution": (nn.Conv1d, nn.Conv2d),
}
"""Kind of layer -> its classes."""

ATTENDED = ("queries", "keys", "values")
"""What an attention module attends with."""

PROBABILITIES = "probabilities"
"""The attention maps that it multiplies values with."""

MISSING = {
    "linear": "Linear or Conv1D",
    "convolution": "Conv1d or Conv2d",
    "embedding": "Embedding",
    "experts": "experts whose weights transformers says how to read (use_experts_implementation)",
    "attention": "attention that asks transformers' AttentionInterface for its function",
    PROBABILITIES: "attention that asks transformers' AttentionInterface for its function",
}
"""Kind of layer -> what a model lacks that has none."""


def sites(model: nn.Module, target: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of everything of one kind in a model, in its order."""
    for name, module in named_plain_modules(model):
        if target in LEAVES:
            if _is_leaf(module, LEAVES[target]):
                yield name, module
        elif target == "embedding":
            if isinstance(base_layer(module), nn.Embedding) and _has_numbers(base_layer(module)):
                yield name, module
        elif target == "experts":
            yield from ((f"{name}.{parameter}", module) for parameter in _expert_weights(module))
        elif _attends(module):
            parts = (PROBABILITIES,) if target == PROBABILITIES else ATTENDED
            yield from ((f"{name}.{part}", module) for part in parts)


def target_of(name: str, module: nn.Module) -> str:
    """Return the kind of what has this name.

    Raises:
        TargetError: If it is none that can be quantized.
    """
    layer = base_layer(module)
    found = next((target for target, classes in LEAVES.items() if isinstance(layer, classes)), None)
    if found is not None:
        return found
    if isinstance(layer, nn.Embedding):
        return "embedding"
    part = name.rpartition(".")[2]
    if part in (*ATTENDED, PROBABILITIES) and _attends(module):
        return PROBABILITIES if part == PROBABILITIES else "attention"
    if part in _expert_weights(module):
        return "experts"
    leaf_kind(name, module)  # raises
    raise TargetError(f"quantization: {name!r} is a {type(module).__name__}, which cannot be quantized.")


def parameter_name(name: str, module: nn.Module) -> str:
    """Return what the weight of something is called within its module."""
    return name.rpartition(".")[2] if target_of(name, module) == "experts" else "weight"


def owned_parameter(name: str, module: nn.Module) -> nn.Parameter | None:
    """Return the weight of something as it is stored, without adapters; None for attention."""
    if target_of(name, module) in ("attention", PROBABILITIES):
        return None
    return base_layer(module).get_parameter(parameter_name(name, module))


def oriented_weight(name: str, module: nn.Module) -> nn.Parameter:
    """Return a weight as [outputs, inputs...], adapters merged: a view, but for experts that store it otherwise."""
    target = target_of(name, module)
    if target in LEAVES:
        weight: Any = leaf_kind(name, module).oriented(effective_weight(module))
    elif target == "experts":
        weight = as_matrix(module, module.get_parameter(parameter_name(name, module)))
    else:
        weight = module.get_parameter("weight")
    return weight  # type: ignore[no-any-return]


def write_weight(name: str, module: nn.Module, values: Tensor) -> None:
    """Give a layer without adapters a weight, [outputs, inputs...]."""
    parameter: Any = owned_parameter(name, module)
    if target_of(name, module) == "experts":
        values = from_matrix(module, values, parameter)
    elif target_of(name, module) in LEAVES:
        values = leaf_kind(name, module).oriented(values)
    parameter.data.copy_(values)


def as_matrix(module: nn.Module, parameter: Tensor) -> Tensor:
    """Return a weight of experts as [experts * outputs, inputs]; anything else as it is.

    Transformers stores [experts, outputs, inputs], or with the last two swapped where ``is_transposed`` says so.
    """
    if parameter.dim() != 3:
        return parameter
    parameter = parameter.transpose(1, 2) if module.is_transposed else parameter
    return parameter.reshape(-1, parameter.shape[-1])


def from_matrix(module: nn.Module, matrix: Tensor, like: Tensor) -> Tensor:
    """Return what ``as_matrix`` was given, in the shape of ``like``."""
    if like.dim() != 3:
        return matrix
    if not module.is_transposed:
        return matrix.view(like.shape)
    return matrix.view(like.shape[0], like.shape[2], like.shape[1]).transpose(1, 2)


def check_embedding(name: str, module: nn.Module) -> None:
    """Check that a table can be quantized while it is trained.

    Raises:
        TargetError: If looking something up changes the table, or its gradient is sparse.
    """
    for setting, allowed in (("max_norm", None), ("sparse", False)):
        if getattr(module, setting) != allowed:
            raise TargetError(
                f"quantization: the embedding {name!r} has {setting}={getattr(module, setting)!r}; allowed: {allowed}. "
                "Set it so, or exclude the embedding."
            )


def _is_leaf(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    # MultiheadAttention reads the weight of its NonDynamicallyQuantizableLinear and never calls it; a layer that
    # lost all inputs or outputs has no numbers.
    layer = base_layer(module)
    return isinstance(layer, classes) and not isinstance(layer, NonDynamicallyQuantizableLinear) and _has_numbers(layer)


def _has_numbers(module: nn.Module) -> bool:
    return "weight" in module._parameters and module.get_parameter("weight").numel() > 0


def _expert_weights(module: nn.Module) -> list[str]:
    """Return the names of the weights that experts are multiplied with; nothing where no layout is declared."""
    declared = {"is_transposed", "is_concatenated"} <= module.__dict__.keys()
    found = module._parameters.items() if declared else ()
    return [name for name, each in found if each is not None and each.dim() == 3 and each.numel() > 0]


def _attends(module: nn.Module) -> bool:
    if find_leaf_kind(module) is not None:
        return False
    forward: Callable[..., Any] = inspect.unwrap(own_class(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and {"get_interface", "ALL_ATTENTION_FUNCTIONS"} <= set(code.co_names)
