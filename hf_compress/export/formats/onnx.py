"""``model.onnx`` for ONNX Runtime: integer weights, and integer arithmetic where inputs are quantized."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import ExportError
from hf_compress.export.formats.base import Format, progress, range_of_its_own, run_example, without_grid
from hf_compress.export.formats.onnx_layers import OPSET, replace_forward
from hf_compress.graph.capture import evaluating
from hf_compress.instruments.attach import find_leaf_kind, own_class
from hf_compress.instruments.quantize import QuantizedLayer
from hf_compress.shrinking.verify import FORWARD_ERRORS

LARGE = 1 << 30
"""Bytes of weights from which on they are stored in a file of their own; one file may hold 2 GiB."""


class Onnx(Format):
    """Observed ranges become QuantizeLinear and DequantizeLinear; ranges computed at every call, arithmetic.

    DynamicQuantizeLinear would give all tokens one range, and unsigned integers. So a token's step is computed by plain
    operators and the product by MatMulInteger: exactly the numbers that were trained.
    """

    name = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"
    records = True
    runtime = "onnxruntime"

    def refusal(self, layer: QuantizedLayer) -> str | None:
        """Return what cannot be expressed."""
        if find_leaf_kind(layer.module) is None:
            return f"is a {own_class(layer.module).__name__}; onnx is for Linear, Conv1D and convolutions"
        role = without_grid(layer)
        if role is not None:
            return f"has {role} that are no integers times a step"
        other = range_of_its_own(layer)
        if other is not None:
            return other
        if layer.module.weight.dtype != torch.float32:
            return f"has a weight in {layer.module.weight.dtype}, for which ONNX Runtime lacks kernels; use float()"
        return None

    def write(
        self, model: PreTrainedModel, layers: list[QuantizedLayer], folder: Path, inputs: Mapping[str, Any] | None
    ) -> None:
        """Write a model, see ``Format.write``."""
        assert inputs is not None
        with evaluating(model):
            names = _output_names(model, inputs)
        for layer in progress(layers):
            replace_forward(layer)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        options = {name: value for name, value in inputs.items() if name not in tensors}
        recorded = _Recorded(model, list(tensors), options, names).eval()
        try:
            with _quiet(), torch.no_grad():
                program: Any = torch.onnx.export(
                    recorded,
                    tuple(tensors.values()),
                    input_names=list(tensors),
                    output_names=names,
                    dynamic_shapes=(tuple(_dynamic(each) for each in tensors.values()),),
                    opset_version=OPSET,
                    dynamo=True,
                    verbose=False,
                )
        except (*FORWARD_ERRORS, torch.onnx.errors.OnnxExporterError) as error:
            raise ExportError(
                f"export_quantized: {type(model).__name__} cannot be recorded as an ONNX graph: {str(error)[:500]} Use "
                "another format."
            ) from error
        _warn_about_fixed_sizes(program, tensors)
        size = sum(each.numel() * each.element_size() for each in model.parameters())
        program.save(folder / "model.onnx", external_data=size > LARGE)


class _Recorded(nn.Module):
    """A model whose inputs have an order, and whose result is a tuple."""

    def __init__(self, model: PreTrainedModel, inputs: list[str], options: dict[str, Any], outputs: list[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs, self.options, self.outputs = inputs, options, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, tensors, strict=True))
        result = self.model(**given, **self.options, return_dict=True)
        return tuple(result[name] for name in self.outputs)


def _output_names(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[str]:
    return list(run_example(model, inputs, "so its graph cannot be recorded. Pass example_inputs that it runs on."))


def _dynamic(tensor: Tensor) -> dict[int, Any]:
    """Say that batch and, of text, length may be others than those of the example."""
    is_text = tensor.dim() == 2 and not tensor.is_floating_point()
    return dict.fromkeys(range(2 if is_text else min(tensor.dim(), 1)), torch.export.Dim.AUTO)


def _warn_about_fixed_sizes(program: Any, tensors: Mapping[str, Tensor]) -> None:
    """Say which sizes the model's own code has turned into constants."""
    fixed = []
    for value in program.model.graph.inputs:
        wanted = _dynamic(tensors[value.name])
        fixed += [f"{value.name} [{dim}] = {value.shape[dim]}" for dim in wanted if isinstance(value.shape[dim], int)]
    if fixed:
        warnings.warn(
            f"export_quantized: the ONNX model takes only the sizes of the example inputs: {', '.join(fixed)}. Pass "
            "example_inputs of the sizes that you will use.",
            UserWarning,
            stacklevel=2,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about itself and its own libraries."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
