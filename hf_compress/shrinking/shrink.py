"""``shrink``: from a trained model and masks to a physically smaller model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import ShrinkError
from hf_compress.graph.accept import check_model, remedy_for
from hf_compress.graph.blocks import close_gaps
from hf_compress.graph.fake import has_no_weights
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.adapters import has_adapters, merge_in_place, without_wrapper
from hf_compress.instruments.layer import LayerGates
from hf_compress.instruments.quantize import Quantized, attached_quantizers, enable_quantizers
from hf_compress.instruments.subset import SubsetGate
from hf_compress.shrinking import verify as verification
from hf_compress.shrinking.apply import plain_copy, silence, slice_in_place
from hf_compress.shrinking.depth import drop_layers
from hf_compress.shrinking.describe import describe_sizes
from hf_compress.shrinking.plan import ShrinkPlan, check_request, plan_on, refuse_compressed
from hf_compress.shrinking.quantizers import cuts, move_quantizers
from hf_compress.shrinking.reload import reload_check


@runtime_checkable
class MaskSource(Protocol):
    """A callback that holds masks."""

    def masks(self) -> dict[str, Tensor]:
        """Return a bool tensor [num_units] per group name, True = keep."""
        ...


@runtime_checkable
class ModelMaskSource(MaskSource, Protocol):
    """A callback that knows whose masks it holds."""

    @property
    def masked_model(self) -> nn.Module | None:
        """The model that the masks were made for; None if it is gone."""
        ...


def shrink(
    model_or_trainer: Any,
    masks: Mapping[str, Tensor] | None = None,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    uniform: bool = False,
    multiple_of: int = 1,
    verify: bool = True,
    quantizers: bool = True,
) -> PreTrainedModel:
    """Return a smaller copy of the model that computes what the masked model computes.

    Args:
        model_or_trainer: A model, or a Trainer that trained with a ``PruningCallback``. A trainer's LoRA adapters are
            merged in the copy; a model's have to be merged before.
        masks: See ``plan_shrink``; taken from the trainer's callbacks by default.
        example_inputs: See ``plan_shrink``.
        uniform: See ``plan_shrink``.
        multiple_of: See ``plan_shrink``.
        verify: Compare the outputs of the masked and the shrunk model, and of the shrunk model loaded again, before
            returning. In floating point: what rounds is put on afterwards.
        quantizers: Give the smaller model the fake quantizers that the model has, with their learned steps and observed
            ranges. They do not act: it computes in floating point, as it does when it is saved and loaded again.
            ``export_quantized`` stores them; ``enable_quantizers(small)`` lets it compute what the masked quantized
            model computes. False: leave them out.

    Forward hooks of the model run while it is recorded and verified, and are copied with it.

    Returns:
        A ``PreTrainedModel`` of the same class, in eval mode; save, push or train it like any other. The original is
        untouched.

    Raises:
        ShrinkError: If there are no masks, or masks of another model, training is still running, the model is
            quantized already or has no weights, or the shrunk model differs from the masked one; or groups of weights
            that share a step do not divide what is left.
        TargetError: If the masks ask for what the model does not have or must not lose.
    """
    model = _model_of(model_or_trainer)
    refuse_compressed(model)
    if has_no_weights(model):
        raise ShrinkError(
            f"shrink: the {type(model).__name__} is on the meta device, so there are no weights to cut. Load it with "
            "from_pretrained; plan_shrink(model, masks) works without weights."
        )
    chosen = masks if masks is not None else _masks_of(model_or_trainer, model)
    check_request(chosen, multiple_of)
    given = model is model_or_trainer
    if given:  # a trainer's may have adapters or be sharded; its copy has neither
        check_model(model, example_inputs)
    merge = not given and has_adapters(model)
    duplicate = _merged_copy(model, merge=merge)
    graph = ModelGraph(duplicate, example_inputs)
    plan = plan_on(graph, chosen, uniform=uniform, multiple_of=multiple_of)
    original = attached_quantizers(model) if quantizers else Quantized()
    cut = cuts(duplicate, original, plan.keep)
    reference = _masked_reference(duplicate, graph, plan, example_inputs) if verify else None
    slice_in_place(duplicate, plan)
    drop_layers(duplicate, plan.layers)
    close_gaps(duplicate)
    if reference is None:
        describe_sizes(duplicate, plan, graph.numeric_attributes())
    else:

        @contextmanager
        def masked_again() -> Iterator[PreTrainedModel]:
            with _masked(_merged_copy(model, merge=merge), graph, plan) as masked:
                yield masked

        verification.verify(duplicate, reference, masked_again)
        agrees = reload_check(duplicate, reference.inputs[0], lambda: _merged_copy(model, merge=merge))
        describe_sizes(duplicate, plan, graph.numeric_attributes(), agrees)
    move_quantizers(original, duplicate, cut, plan.layers)
    enable_quantizers(duplicate, False)  # it is what it will be when it is saved and loaded again
    duplicate.train(False)
    return duplicate


def _merged_copy(model: PreTrainedModel, *, merge: bool) -> PreTrainedModel:
    duplicate = plain_copy(model)
    if merge:
        merge_in_place(duplicate)
    return duplicate


def _masked_reference(
    model: PreTrainedModel, graph: ModelGraph, plan: ShrinkPlan, example_inputs: Mapping[str, Any] | None
) -> verification.Reference:
    """Turn ``model`` into the masked model and record what it computes; it is sliced next: one copy in memory."""
    try:
        with _masked(model, graph, plan) as masked:
            return verification.record_reference(masked, example_inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        names = ", ".join(repr(name) for name in plan.groups)
        raise ShrinkError(
            f"{type(model).__name__} does not run with units masked ({type(error).__name__}: {error}): a norm or "
            "router cannot be run on a part of its units. Exclude the structure "
            f"({names}). The original model is untouched."
        ) from error


@contextmanager
def _masked(model: PreTrainedModel, graph: ModelGraph, plan: ShrinkPlan) -> Iterator[PreTrainedModel]:
    """Silence pruned units for good, and let norms and routers see the kept ones alone while the context is open."""
    silence(model, plan.zero)
    gates: list[Any] = []
    for group in graph.groups:
        if group.name not in plan.groups:
            continue
        mask = torch.zeros(group.num_units, dtype=torch.bool)
        mask[list(plan.groups[group.name].kept)] = True
        if group.modules:
            gates.append(LayerGates(group, model, mask.float()))
        elif group.subsets:
            gates.append(SubsetGate(group, model))
            gates[-1].set_mask(mask)
    try:
        yield model
    finally:
        for gate in gates:
            gate.remove()


def _model_of(model_or_trainer: Any) -> PreTrainedModel:
    model = model_or_trainer
    if not isinstance(model, nn.Module) and hasattr(model, "accelerator"):
        model = without_wrapper(model.accelerator.unwrap_model(model.model))
    if not isinstance(model, PreTrainedModel):
        remedy = remedy_for(model)
        raise ShrinkError(
            f"shrink: got {type(model).__name__}; allowed: a transformers PreTrainedModel or a Trainer."
            + (f" {remedy[0].upper()}{remedy[1:]}" if remedy is not None else "")
        )
    return model


def _masks_of(source: Any, model: PreTrainedModel) -> dict[str, Tensor]:
    if isinstance(source, nn.Module):
        return {}
    callbacks = source.callback_handler.callbacks
    found = []
    for callback in callbacks:
        if isinstance(callback, MaskSource):
            found.append(callback.masks())
        if isinstance(callback, ModelMaskSource) and callback.masked_model is not model:
            raise ShrinkError(
                f"shrink: the masks of the {type(callback).__name__} were made for another model than the trainer's "
                "now: the callback served another Trainer since, or trainer.model was replaced. Use one callback per "
                "Trainer and shrink before the next run, or pass masks={group name: bool tensor}."
            )
    if not found:
        names = ", ".join(type(callback).__name__ for callback in callbacks)
        raise ShrinkError(
            f"shrink: none of the trainer's callbacks ({names}) holds masks. Add a PruningCallback and train, or pass "
            "masks={group name: bool tensor}."
        )
    return {name: mask for masks in found for name, mask in masks.items()}
