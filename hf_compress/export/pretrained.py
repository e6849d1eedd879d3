"""Save and reload models whose layers differ in size, through ``from_pretrained`` as it is.

Transformers asks the ``quantization_config`` of a checkpoint which quantizer prepares the empty model before the
weights are loaded. The one registered here, ``"hf_compress"``, resizes parameters; ``model_type`` stays what it
was, and with it Auto classes, pipelines and widgets. If the weights are integers too, the quantizer of their own
format does the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import quantizer_compressed_tensors
from transformers.quantizers.auto import (
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_compress.errors import ExportError, choices, shown
from hf_compress.export.attributes import change_modules, checked_attributes, checked_emptied, set_attributes
from hf_compress.export.buffers import checked_buffers, slice_buffers
from hf_compress.export.checked import (
    check_steps,
    checked_guard,
    checked_inner,
    checked_names,
    checked_shapes,
    checked_units,
)
from hf_compress.export.heads import has_another_head, is_narrow, sizes_of_new_parameters
from hf_compress.export.stored import follow_resizing, stored_shapes
from hf_compress.shrinking.describe import FORMAT_VERSION
from hf_compress.shrinking.sizes import METHOD, refresh_sizes, store_too


@register_quantization_config(METHOD)
class CompressedConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a model with uneven layers, as stored in its ``config.json``.

    Args:
        shapes: Parameter name -> shape, for every parameter whose shape is not what the config alone gives.
        units: Facts about the architecture: group name -> ``{"kept": units left, "of": units before any shrink}``.
        attributes: ``[module, path, value]`` for every integer of the forward code that follows the sizes.
        buffers: Name -> dimension -> positions that stay, for buffers that are made anew instead of stored.
        flexible: Names of ``nn.MultiheadAttention`` modules of other sizes than PyTorch's own forward allows.
        emptied: Attention modules without heads: name -> name of the output projection within (or None), and how many
            results the module returns (or None for one tensor).
        inner: The ``quantization_config`` of the weights' own format, or None for floating point.
        guard: Name of a parameter that is stored with a leading dimension of 1, see ``choose_guard``.
        version: Version of this form.
        quant_method: Always ``"hf_compress"``.
        unknown: Keys that this version does not know.

    Raises:
        ExportError: If the form is not understood.
    """

    def __init__(
        self,
        shapes: Mapping[str, list[int]] | None = None,
        units: Mapping[str, Any] | None = None,
        attributes: Any = None,
        buffers: Mapping[str, Any] | None = None,
        flexible: Sequence[str] = (),
        emptied: Mapping[str, Any] | None = None,
        inner: Mapping[str, Any] | None = None,
        guard: str | None = None,
        version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if type(version) is not int or version != FORMAT_VERSION or unknown:
            what = f"unknown keys {shown(sorted(unknown))}" if unknown else f"version {shown(version)}"
            raise ExportError(
                f"config.json, quantization_config: {what}; this hf-compress reads version {FORMAT_VERSION}. Upgrade "
                "hf-compress (pip install -U hf-compress), or load with the version that wrote the model."
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' enum has no entry for it
        self.version = version
        self.units = checked_units(units)
        self.shapes = checked_shapes(shapes)
        self.attributes = checked_attributes(attributes)
        self.buffers = checked_buffers(buffers)
        self.flexible = checked_names(flexible)
        self.emptied = checked_emptied(emptied)
        self.inner = checked_inner(inner)
        self.guard = checked_guard(guard)

    def to_dict(self) -> dict[str, Any]:
        """Return the stored form."""
        stored: dict[str, Any] = super().to_dict()
        stored["attributes"] = [[module, list(path), value] for module, path, value in self.attributes]
        stored["buffers"] = {n: {str(d): kept for d, kept in dims.items()} for n, dims in self.buffers.items()}
        for optional in ("attributes", "buffers", "flexible", "emptied", "inner", "guard"):
            if not stored[optional]:
                del stored[optional]
        return stored

    def inner_method(self) -> str:
        """Return the name of the weights' own format.

        Raises:
            ExportError: If it cannot be combined with uneven sizes.
        """
        method = (self.inner or {}).get("quant_method")
        if not isinstance(method, str) or method not in _COMBINED:
            known = choices(method, _COMBINED)
            raise ExportError(f"config.json, quantization_config.inner: unknown format {shown(method)}; {known}.")
        return str(getattr(method, "value", method))

    def inner_config(self) -> Any:
        """Return the transformers config object of the weights' own format.

        Raises:
            ExportError: If the format is unknown or its library is missing.
        """
        method = self.inner_method()
        try:
            return AutoQuantizationConfig.from_dict(dict(self.inner or {}))
        except ImportError as error:
            raise ExportError(
                f"the model's weights are in {method} format, which needs the {method} package: {error}. Install it "
                f"with: pip install 'hf-compress[{_EXTRAS[method]}]'"
            ) from error
        except Exception as error:  # whatever the library of the format raises about it
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ExportError(
                f"config.json, quantization_config.inner: is no {method} format: {shown(text)}."
            ) from error


class _Resizing(HfQuantizer):
    """Mixin: resize the empty model, then let the next class prepare it."""

    def __init__(self, quantization_config: CompressedConfig, **kwargs: Any) -> None:
        self.outer = quantization_config
        inner = quantization_config if quantization_config.inner is None else quantization_config.inner_config()
        super().__init__(inner, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        change_modules(model, self.outer.emptied, self.outer.flexible)
        stored = stored_shapes(kwargs.get("checkpoint_files"))
        shapes = follow_resizing(model, _resolve_names(model, self.outer.shapes), stored)
        another = is_narrow(self.outer.units) and type(model).__name__ not in _written_for(model)
        if another and has_another_head(model, shapes, None if stored is None else stored.keys()):
            shapes |= sizes_of_new_parameters(model, shapes)
        self.outer.shapes = resize_parameters(model, shapes)
        self.outer.attributes = set_attributes(model, self.outer.attributes)
        super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[no-untyped-call]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        model.config.quantization_config = self.outer
        _check_loaded(model, self.outer.shapes)
        store_too(model, self.outer.shapes)
        slice_buffers(model, self.outer.buffers)
        # Saving applies the conversions of loading in reverse, and transformers has no reverse for making integer
        # tensors. None is needed: get_state_dict_and_metadata takes them apart again.
        conversions = getattr(model, "_weight_conversions", None) or []
        remaining: Any = [c for c in conversions if not _belongs_to(c, self)]
        model._weight_conversions = remaining
        return super()._process_model_after_weight_loading(model, **kwargs)


class _Guarded(_Resizing):
    """Mixin for weights with a format of their own, which stay quantized: the guard is stored in another shape."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        if self.outer.guard is not None:
            (self.outer.guard,) = _resolve_names(model, {self.outer.guard: []}) or (None,)
        if self.outer.guard is not None:
            reshape_parameter(model, self.outer.guard, lambda stored: stored.unsqueeze(0))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        check_steps(model)
        if self.outer.guard is not None:
            reshape_parameter(model, self.outer.guard, lambda stored: stored.squeeze(0))
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what to store."""
        found, metadata = super().get_state_dict_and_metadata(model)  # type: ignore[no-untyped-call]
        state: dict[str, Tensor] = model.state_dict() if found is None else found
        if self.outer.guard is not None:
            state[self.outer.guard] = state[self.outer.guard].unsqueeze(0)
        return state, metadata


class CompressedTorchAoHfQuantizer(_Guarded, TorchAoHfQuantizer):  # type: ignore[misc]
    """Loads models with uneven layers and integer weights in torchao's format; they stay quantized models."""


class CompressedTensorsHfQuantizer(_Guarded, quantizer_compressed_tensors.CompressedTensorsHfQuantizer):
    """Loads models with uneven layers and integer weights in the compressed-tensors format."""


@register_quantizer(METHOD)
class CompressedHfQuantizer(_Resizing):
    """Loads models with uneven layers; afterwards they are ordinary models, not quantized ones."""

    def __new__(cls, quantization_config: CompressedConfig, **kwargs: Any) -> Any:
        """Return a quantizer for the config, of another class if the weights have a format of their own."""
        if quantization_config.inner is None:
            return super().__new__(cls)
        return _COMBINED[quantization_config.inner_method()](quantization_config, **kwargs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        # The weights are plain floats. With these flags left on, half(), float(), gathering for FSDP and Trainer
        # would treat the model as quantized.
        del model.hf_quantizer, model.is_quantized, model.quantization_method
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        return model

    def is_serializable(self) -> bool:
        """Return whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True


_COMBINED: dict[str, type[_Resizing]] = {
    "torchao": CompressedTorchAoHfQuantizer,
    "compressed-tensors": CompressedTensorsHfQuantizer,
}
"""Formats of the weights themselves that can be combined with uneven sizes."""

_EXTRAS = {"torchao": "int8", "compressed-tensors": "compressed-tensors"}
"""What to install for a format."""


def choose_guard(model: PreTrainedModel, shapes: Mapping[str, list[int]]) -> str | None:
    """Choose the parameter that makes transformers alone fail to load a model with integer weights.

    Transformers skips a ``quant_method`` that it does not know. Integer weights then are unexpected keys and the
    weights missing ones, which it only warns about: the model would load with random weights. A parameter with
    another shape than the architecture's is an error, so one is stored with an extra dimension, unless there is an
    uneven bias already.

    Args:
        model: A model with integer weights.
        shapes: The shapes of its uneven parameters, by name.

    Returns:
        The name of a one-dimensional parameter of the base model, or None if none is needed.

    Raises:
        ExportError: If one is needed and there is none.
    """
    parameters = dict(model.named_parameters())
    if any(name in parameters and parameters[name].dim() == 1 for name in shapes):
        return None
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    vectors = [name for name, parameter in parameters.items() if parameter.dim() == 1 and id(parameter) in inside]
    if not vectors:
        raise ExportError(
            f"{type(model).__name__}: has no bias and no norm, by which transformers would notice that this package is "
            "needed to load uneven integer weights. Use format='dense'."
        )
    return vectors[-1]


def is_uneven(model: PreTrainedModel) -> bool:
    """Return whether the model's sizes need this loader."""
    return stored_method(model) == METHOD


def stored_method(model: PreTrainedModel) -> str | None:
    """Return ``quant_method`` of the model's config, or None without one."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    method = config["quant_method"] if isinstance(config, Mapping) else config.quant_method
    return str(getattr(method, "value", method))


@torch.no_grad()
def resize_parameters(model: PreTrainedModel, shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Give parameters (and persistent buffers) of a model other shapes, their values lost.

    Args:
        model: A model without weights yet.
        shapes: Name -> shape; names may be those of the model with or without its head.

    Returns:
        The shapes under the model's own names, without the head's if the model lacks it.

    Raises:
        ExportError: If the model has no such parameter or the shape does not fit it.
    """
    found = _resolve_names(model, shapes)
    tensors: dict[str, Tensor] = dict(model.named_buffers())
    tensors.update(model.named_parameters(remove_duplicate=False))
    resized: dict[int, Tensor] = {}  # tied parameters stay one
    for name, shape in found.items():
        old = tensors[name]
        if len(shape) != old.dim() or any(new > size for new, size in zip(shape, old.shape, strict=True)):
            raise ExportError(
                f"config.json, quantization_config.shapes: {shown(name)} has shape {shape}, but the architecture gives "
                f"{list(old.shape)}, which can only become smaller. Were other fields of config.json changed?"
            )
        new = resized.setdefault(id(old), _empty(old, shape))
        if list(new.shape) != shape:
            raise ExportError(
                f"config.json, quantization_config.shapes: {name!r} is tied, but its names differ in shape."
            )
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, new)
    refresh_sizes(model)
    return found


def _empty(old: Tensor, shape: list[int]) -> Tensor:
    new = torch.empty(shape, dtype=old.dtype, device=old.device)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def reshape_parameter(model: nn.Module, name: str, view: Callable[[Tensor], Tensor]) -> None:
    """Replace a parameter by a view of it."""
    owner, _, attribute = name.rpartition(".")
    old = model.get_parameter(name)
    new = nn.Parameter(view(old.detach()), requires_grad=old.requires_grad)
    setattr(model.get_submodule(owner), attribute, new)


def _resolve_names(model: PreTrainedModel, shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Translate between the names in a model with a head and in the base model alone."""
    known = model.state_dict().keys()
    prefix = f"{model.base_model_prefix}."
    found: dict[str, list[int]] = {}
    lost = []
    for name, shape in shapes.items():
        candidates = [c for c in (name, name.removeprefix(prefix), prefix + name) if c in known]
        if candidates:
            found[candidates[0]] = shape
        else:
            lost.append(name)
    modules = {module for module, _ in model.named_modules()}
    in_head = not any(name.startswith(prefix) for name in lost)
    # Another class may lack whole modules: a pooler, or the encoder of BART. Transformers reports their weights.
    absent = len(lost) <= len(found) and not any(name.rpartition(".")[0] in modules for name in lost)
    if lost and not (found and (in_head or absent) and type(model).__name__ not in _written_for(model)):
        raise ExportError(
            f"config.json, quantization_config.shapes: the {type(model).__name__} has no parameter {shown(lost[0])} "
            f"({len(lost)} of {len(shapes)} names are unknown). The checkpoint is of another architecture, or of a "
            "version of transformers that names parameters differently."
        )
    return found


def _written_for(model: PreTrainedModel) -> list[str]:
    return list(getattr(model.config, "architectures", None) or [])


def _belongs_to(conversion: Any, quantizer: HfQuantizer) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(getattr(operation, "hf_quantizer", None) is quantizer for operation in operations)


def _check_loaded(model: PreTrainedModel, shapes: Mapping[str, list[int]]) -> None:
    """Integer weights replace whole parameters, so the loader itself does not compare their shapes."""
    tensors = model.state_dict()
    for name, shape in shapes.items():
        packed = tensors.get(f"{name}_shape")  # what is packed into words has its shape beside it
        found = list(tensors[name].shape) if packed is None else packed.tolist()
        if found != shape:
            raise ExportError(
                f"{name!r}: the checkpoint has shape {found}, but its config.json says {shape}. The files are of "
                "different models."
            )
