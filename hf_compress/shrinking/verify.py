"""Check that the shrunk model computes what the masked one computes."""

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import ShrinkError
from hf_compress.graph.capture import evaluating, main_outputs
from hf_compress.graph.inputs import make_example_inputs

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest allowed max|a - b| / max|a|, by dtype of the outputs: rounding differs because sums are shorter."""


CONSTANT = 1e3
"""Outputs this many times larger than any that differs take no part in the scale of errors."""

ROUNDING = 1e-3
"""Smaller differences may come from rounding alone, where a model amplifies it."""

FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AssertionError, ArithmeticError, AttributeError)
"""What forward code raises when a size is not what it expects."""


@dataclass(frozen=True)
class Reference:
    """Outputs of the masked model on several inputs."""

    inputs: list[Mapping[str, Any]]
    outputs: list[list[Tensor]]


def record_reference(masked: PreTrainedModel, example_inputs: Mapping[str, Any] | None) -> Reference:
    """Run the masked model on the example inputs, and on inputs of another batch size and length.

    Raises:
        ShrinkError: If it fails: forward code that cannot be masked cannot be compared with either.
    """
    inputs: list[Mapping[str, Any]] = [dict(example_inputs or make_example_inputs(masked))]
    if example_inputs is None:
        inputs.append(make_example_inputs(masked, batch_size=3, length=8, seed=1))
    precise = in_full_precision(masked)
    try:
        outputs = [run(precise, each) for each in inputs]
        others = _shorter(inputs[0]) if example_inputs is not None else []
        for each in others:  # code may take another way there; not every model takes them
            with suppress(*FORWARD_ERRORS):
                outputs.append(run(precise, each))
                inputs.append(each)
    except FORWARD_ERRORS as error:
        raise ShrinkError(
            f"{type(masked).__name__} does not run with these masks ({type(error).__name__}: {error}), so the result "
            "could not be verified. Exclude that kind of structure. The original model is untouched."
        ) from error
    if not comparable(outputs):
        raise ShrinkError(
            f"{type(masked).__name__}: all outputs are zero or none is finite, so there is nothing to verify the "
            "result with. Are weights NaN or zero? Pass example_inputs that give other outputs, or verify=False. The "
            "original model is untouched."
        )
    return Reference(inputs, outputs)


def in_full_precision(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model, or a float32 copy if it has less: rounding would be as large as real errors."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if not types & {torch.bfloat16, torch.float16}:
        return model
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        duplicate: Any = copy.deepcopy(model)
        precise: PreTrainedModel = duplicate.float()
        return precise
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _shorter(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the inputs with one example, and cut along the dimension that all tensors but vectors share."""
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.dim() > 0}
    batches, lengths = {t.shape[0] for t in tensors.values()}, {t.shape[1] for t in tensors.values() if t.dim() > 1}
    found = []
    if len(batches) == 1 and batches != {1}:
        found.append({**inputs, **{key: value[:1] for key, value in tensors.items()}})
    if len(lengths) == 1 and min(lengths) > 2:
        cut = max(2, min(lengths) // 2)
        found.append({**inputs, **{key: value[:, :cut] for key, value in tensors.items() if value.dim() > 1}})
    return found


def run(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the main outputs of ``model`` in eval mode: floating-point ones, or all if it has no such."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    given = {key: _as(value, dtype) for key, value in inputs.items()}
    with evaluating(model):
        outputs = main_outputs(model(**given))
    return [t for t in outputs if t.is_floating_point()] or outputs


def _as(value: Any, dtype: torch.dtype | None) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def comparable(outputs: list[list[Tensor]]) -> bool:
    """Return whether equal outputs would say anything: not if all are zero, or none is finite."""
    return any(bool((torch.isfinite(t) & (t != 0)).any()) for tensors in outputs for t in tensors)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest values that tell something.

    Values that are far larger than all that differ are equal constants, such as the lowest number in place of a
    forbidden token; they would hide every error.

    Returns:
        max|a - b| / max|a|; infinite when shapes differ, when other values are non-finite, or when integers differ.
    """
    if a.shape != b.shape:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    a, b = a.detach().double(), b.detach().double()
    finite = torch.isfinite(a)
    same = torch.equal(finite, torch.isfinite(b)) and torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num())
    if not same:
        return float("inf")
    a, b = a[finite], b[finite]
    different = a != b
    if not different.any():
        return 0.0
    largest = a[different].abs().max().clamp_min(1e-30)
    scale = a.abs()[a.abs() <= CONSTANT * largest].max()
    return float((a - b).abs().max() / scale.clamp_min(1e-30))


def verify(shrunk: PreTrainedModel, reference: Reference, masked_again: Any) -> None:
    """Compare the shrunk model with the reference.

    Args:
        shrunk: The sliced model.
        reference: What the masked model of the original sizes gave.
        masked_again: Returns a context manager that gives the masked model, only to name the first module that differs.

    Raises:
        ShrinkError: If the shrunk model fails to run or gives other numbers.
    """
    precise = in_full_precision(shrunk)
    for inputs, expected in zip(reference.inputs, reference.outputs, strict=True):
        try:
            actual = run(precise, inputs)
        except FORWARD_ERRORS as error:
            raise ShrinkError(
                f"{type(shrunk).__name__} does not run after shrinking ({type(error).__name__}: {error}). Its forward "
                "reads a size that slicing parameters does not change; exclude that kind of structure. The original "
                "model is untouched."
            ) from error
        errors = [relative_error(a, b) for a, b in zip(expected, actual, strict=True)]
        allowed = [TOLERANCES.get(t.dtype, 1e-5) for t in expected]
        if any(error > limit for error, limit in zip(errors, allowed, strict=True)):
            with masked_again() as masked:
                if max(errors) < ROUNDING and _agree_in_double(masked, precise, inputs):
                    continue
                where = first_difference(in_full_precision(masked), precise, inputs, max(allowed))
            raise ShrinkError(
                f"{type(shrunk).__name__}: the shrunk model differs from the masked one by {max(errors):.1e} (allowed: "
                f"{max(allowed):.0e}); first module that differs: {where}. The result was discarded and the original "
                "model is untouched; exclude that structure."
            )


def _agree_in_double(masked: PreTrainedModel, shrunk: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    """Compare in float64: rounding goes, errors stay. ``masked`` is converted in place."""
    pair = [masked, copy.deepcopy(shrunk)]
    try:
        expected, actual = (run(cast(Any, model).double(), inputs) for model in pair)
    except FORWARD_ERRORS:  # code that insists on float32
        return False
    return all(relative_error(a, b) <= TOLERANCES[torch.float32] for a, b in zip(expected, actual, strict=True))


def first_difference(masked: nn.Module, shrunk: nn.Module, inputs: Mapping[str, Any], limit: float) -> str:
    """Name the first module, in execution order, whose output has the same shape in both models but other values."""
    reference, actual = _module_outputs(masked, inputs), _module_outputs(shrunk, inputs)
    for name, expected in reference.items():
        other = actual.get(name)
        if other is not None and expected.shape == other.shape and relative_error(expected, other) > limit:
            return repr(name or type(masked).__name__)
    return "none with comparable output"


def _module_outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str, result: Any) -> None:
        value = result[0] if isinstance(result, tuple) and result else result
        if isinstance(value, Tensor) and value.is_floating_point():
            outputs.setdefault(name, value)

    handles = [
        module.register_forward_hook(lambda _m, _i, result, name=name: keep(name, result))
        for name, module in model.named_modules()
    ]
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
