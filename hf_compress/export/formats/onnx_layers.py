"""How a quantized layer computes in an ONNX graph.

Operators of ONNX stand in the forward pass itself; ``torch.onnx.export`` takes them over as they are. Letters in
shapes: O outputs, I inputs.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.export.formats.base import StoredWeight, stored_weight
from hf_compress.instruments.attach import leaf_kind
from hf_compress.instruments.leaf import LeafKind
from hf_compress.instruments.quantize import QuantizedLayer
from hf_compress.quantization.granularity import Granularity
from hf_compress.quantization.grid import EPS, Grid
from hf_compress.quantization.quantizers import Quantizer, RangeQuantizer

OPSET = 21
"""Of ONNX; the first with steps per group."""

_UNSIGNED = 128
"""What int8 values are raised by where they are stored as uint8, which the kernels on x86 expect of activations."""


def replace_forward(layer: QuantizedLayer) -> None:
    """Let a layer compute with integers when it is recorded."""
    module: Any = layer.module
    kind = leaf_kind(layer.name, module)
    inputs = None if layer.inputs is None else _Activation(module, "inputs", layer.inputs)
    outputs = None if layer.outputs is None else _Activation(module, "outputs", layer.outputs)
    stored = None if layer.weights is None else stored_weight(layer)
    if stored is not None and kind.is_linear and inputs is not None and inputs.computed and _fits_product(stored):
        product = _integer_product(module, stored, inputs)
    else:
        product = _float_product(module, kind, stored, inputs)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = product(x)
        return y if outputs is None else outputs.rounded(y)

    module.forward = types.MethodType(forward, module)


class _Activation:
    """An input or an output that is quantized.

    Args:
        module: Gets the step as a buffer if it was observed.
        role: For the names of the buffers.
        quantizer: Its quantizer.
    """

    def __init__(self, module: nn.Module, role: str, quantizer: Quantizer) -> None:
        assert quantizer.grid is not None
        self._module, self._role = module, role
        self.grid: Grid = quantizer.grid
        self._granularity: Granularity = quantizer.granularity
        self._dynamic = isinstance(quantizer, RangeQuantizer)
        self.computed = self._dynamic or self.grid.num_bits != 8
        if not self._dynamic:
            scale, zero_point = quantizer.parameters()
            zero = torch.zeros((), dtype=torch.int32) if zero_point is None else zero_point.reshape(())
            _keep(module, f"{role}_scale", scale.detach().reshape(()).float())
            _keep(module, f"{role}_zero_point", zero if self.computed else (zero + _UNSIGNED).to(torch.uint8))

    def rounded(self, x: Tensor) -> Tensor:
        """Return values on the grid."""
        if self.computed:
            integers, scale, zero_point = self.integers(x)
            return (integers if zero_point is None else integers - zero_point) * scale
        scale, zero_point = self._stored()
        integers = _operator("QuantizeLinear", (x, scale, zero_point), torch.uint8, x.shape)
        return _operator("DequantizeLinear", (integers, scale, zero_point), torch.float32, x.shape)

    def integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return integers, as floats, with their step and zero point: by plain operators."""
        scale, zero_point = self._range(x) if self._dynamic else self._stored()
        zero = None if self.grid.symmetric else zero_point
        steps = torch.round(x * (1.0 / scale))
        if zero is not None:
            zero = zero.to(torch.float32)
            steps = steps + zero
        return steps.clamp(self.grid.low, self.grid.high), scale, zero

    def _stored(self) -> tuple[Tensor, Tensor]:
        return _kept(self._module, f"{self._role}_scale"), _kept(self._module, f"{self._role}_zero_point")

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return step and zero point of a tensor, as ``Grid.parameters`` does."""
        if self._granularity.kind != "token":
            x = x.reshape(1, -1)
        if self.grid.symmetric:
            largest = x.abs().amax(-1, keepdim=True)
            return (largest / ((self.grid.high - self.grid.low) / 2)).clamp_min(EPS), torch.zeros(())
        low = x.amin(-1, keepdim=True).clamp_max(0)
        high = x.amax(-1, keepdim=True).clamp_min(0)
        scale = ((high - low) / (self.grid.high - self.grid.low)).clamp_min(EPS)
        zero_point = (self.grid.low - torch.round(low / scale)).clamp(self.grid.low, self.grid.high)
        return scale, zero_point


def _fits_product(stored: StoredWeight) -> bool:
    """Return whether the step of an output can be multiplied after the product of integers."""
    return stored.granularity.kind in ("channel", "tensor") and stored.zero_point is None


def _integer_product(module: Any, stored: StoredWeight, inputs: _Activation) -> Callable[[Tensor], Tensor]:
    """Return (q - z) W s_x s_w + b with a product of integers: q W - z (sum of each column of W)."""
    _keep(module, "weight_integers", stored.integers.t().contiguous())
    _keep(module, "weight_scale", stored.scale)
    _keep(module, "weight_sum", stored.integers.sum(1, dtype=torch.int32).float())

    def compute(x: Tensor) -> Tensor:
        integers, scale, zero_point = inputs.integers(x)
        operands = integers.to(torch.int8), _kept(module, "weight_integers")
        shape = (*x.shape[:-1], stored.integers.shape[0])
        y = _operator("MatMulInteger", operands, torch.int32, shape).to(torch.float32)
        if zero_point is not None:
            y = y - zero_point * _kept(module, "weight_sum")
        y = y * scale * _kept(module, "weight_scale")
        return y if module.bias is None else y + module.bias

    return compute


def _float_product(
    module: Any, kind: LeafKind, stored: StoredWeight | None, inputs: _Activation | None
) -> Callable[[Tensor], Tensor]:
    """Return the layer's own product, of values that ONNX Runtime fuses with it where it has an integer kernel."""
    shape = module.weight.shape
    if stored is not None:
        _keep_weight(module, stored, inputs_first=kind.is_linear)

    def compute(x: Tensor) -> Tensor:
        x = x if inputs is None else inputs.rounded(x)
        if stored is None:
            return kind.compute(module, x, module.weight, module.bias)
        weight = _dequantized(module, stored, inputs_first=kind.is_linear)
        if not kind.is_linear:
            return kind.compute(module, x, weight.view(shape), module.bias)
        y = x @ weight
        return y if module.bias is None else y + module.bias

    return compute


def _keep_weight(module: nn.Module, stored: StoredWeight, *, inputs_first: bool) -> None:
    """Keep integers, steps and zero points; those of a product as [I, O], as MatMul reads them."""
    zeros = torch.zeros_like(stored.scale) if stored.zero_point is None else stored.zero_point
    found = {"weight_integers": stored.integers}
    for name, each in (("weight_scale", stored.scale), ("weight_zero_point", zeros.to(torch.int8))):
        grouped = stored.granularity.kind == "group"
        found[name] = stored.per_row(each) if grouped else each.reshape(-1 if len(each) > 1 else ())
    for name, each in found.items():
        _keep(module, name, each.t().contiguous() if inputs_first and each.dim() == 2 else each)


def _dequantized(module: nn.Module, stored: StoredWeight, *, inputs_first: bool) -> Tensor:
    integers, scale, zeros = (_kept(module, f"weight_{name}") for name in ("integers", "scale", "zero_point"))
    attributes: dict[str, Any] = {}
    if stored.granularity.kind == "group":
        attributes = {"axis": 0, "block_size": stored.granularity.size}
    elif scale.dim() == 1:
        attributes = {"axis": 1 if inputs_first else 0}
    return _operator("DequantizeLinear", (integers, scale, zeros), torch.float32, integers.shape, attributes)


def _operator(
    name: str, operands: tuple[Tensor, ...], dtype: torch.dtype, shape: Any, attributes: dict[str, Any] | None = None
) -> Tensor:
    """Return the result of an operator of ONNX; while recording, it has a dtype and a shape but no values."""
    found: Tensor = torch.onnx.ops.symbolic(
        name, operands, attributes or {}, dtype=dtype, shape=tuple(shape), version=OPSET
    )
    return found


def _keep(module: nn.Module, name: str, tensor: Tensor) -> None:
    module.register_buffer(f"_onnx_{name}", tensor.to(module.get_parameter("weight").device), persistent=False)


def _kept(module: nn.Module, name: str) -> Tensor:
    return module.get_buffer(f"_onnx_{name}")
