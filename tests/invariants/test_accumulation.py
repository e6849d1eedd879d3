"""Law 6: k micro-batches of b examples teach, score and prune what one batch of k * b does.

The plain Trainer is the reference. It gives models whose loss ignores ``num_items_in_batch`` (BERT's heads) k times
the gradient, which is transformers' own doing; whatever factor it has, compressed training has the same one.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import (
    DELICATE,
    METHODS,
    NO_DROPOUT,
    OPTIONS,
    Recorder,
    as_on_a_gpu,
    cases_of_methods,
    compression,
    distance,
    flat,
    slow_unless,
)
from transformers import TrainerCallback

from hf_compress import PruningCallback, PruningConfig
from hf_compress.instruments.pruner_state import scores_of

# Sums over the same examples in another order differ in the last bits of float32. Dynamic int8 quantization turns a
# last bit into a whole step of 1/127 where a value lies between two integers, but hardly any value does.
TOLERANCE = 1e-4


class Masks(TrainerCallback):
    """Keeps the masks and scores of every step; comes after the pruning callback."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.masks: list[dict[str, Tensor]] = []
        self.scores: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.callback, PruningCallback):
            self.masks.append({name: mask.clone() for name, mask in self.callback._pruner.masks.items()})
            self.scores.append({name: score.clone() for name, score in scores_of(self.callback._pruner).items()})


@pytest.fixture
def setting(tiny_bert: Any, tiny_llama: Any, classification_data: Any, language_data: Any) -> Any:
    """``setting(kind)``: student without dropout, teacher, data; texts and batches are ragged."""

    def make(kind: str) -> tuple[Any, Any, Any]:
        if kind == "bert":
            return tiny_bert(**NO_DROPOUT), tiny_bert(seed=1), classification_data(16)
        return tiny_llama(), tiny_llama(seed=1), language_data(16)

    return make


@cases_of_methods("all")
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_micro_batches_are_one_batch(setting: Any, make_trainer: Any, kind: str, method: str) -> None:
    """Weights stay (learning rate 0), so that every step compares the same model under the same masks."""

    def trained(names: tuple[str, ...], accumulation: int) -> tuple[list[dict[str, Tensor]], Masks]:
        student, teacher, data = setting(kind)
        callbacks = compression(names, teacher)
        recorder, masks = Recorder(), Masks(next(iter(callbacks), None))
        options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        options |= {"learning_rate": 0.0, "max_grad_norm": 0.0}
        make_trainer(student, data, [*callbacks, recorder, masks], **options).train()
        return recorder.gradients, masks

    (plain, _), (plain_parts, _) = trained((), 1), trained((), 4)
    factor = float(flat(plain_parts[0]).norm() / flat(plain[0]).norm())
    assert factor == pytest.approx(4.0 if kind == "bert" else 1.0, rel=1e-4)
    (whole, masks), (parts, masks_of_parts) = trained(METHODS[method], 1), trained(METHODS[method], 4)
    assert len(whole) == len(parts) == 4
    for one, other in zip(whole, parts, strict=True):
        assert distance(other, {name: factor * gradient for name, gradient in one.items()}) < TOLERANCE
    assert distance(whole[-1], plain[-1]) > 100 * TOLERANCE  # the callbacks do something
    for one, other in zip(masks.scores, masks_of_parts.scores, strict=True):
        assert distance(other, {name: factor * score for name, score in one.items()}) < TOLERANCE
    for one, other in zip(masks.masks, masks_of_parts.masks, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    if method in ("pruning", "all"):
        assert sum(int((~mask).sum()) for mask in masks.masks[-1].values()) > 10


SCORED = (*DELICATE, "nothing", "checkpointing", "clipping", "label smoothing")


@pytest.mark.parametrize(
    "option", [slow_unless(option in (*DELICATE, "clipping"), option, name=option) for option in SCORED]
)
def test_scores_are_what_the_plain_trainers_gradients_say(
    tiny_bert: Any, classification_data: Any, make_trainer: Any, option: str
) -> None:
    """d loss / d gate = sum over a unit's weights of w * d loss / d w, with the gradients of a Trainer without us."""
    args = {"learning_rate": 0.0, "max_steps": 2, **OPTIONS[option]}
    data = classification_data(18)  # the second window of ragged accumulation is one batch of 4 and one of 2
    recorder, model = Recorder(), tiny_bert(**NO_DROPOUT)
    # Clipping scales gradients of weights alone: gates are no parameters of the model.
    as_on_a_gpu(make_trainer(model, data, [recorder], **{**args, "max_grad_norm": 0.0})).train()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    settings = {"structures": {"heads": 0.5, "ffn": 0.5}, "begin": 2, "end": 2, "score_decay": 0.0}
    callback = PruningCallback(PruningConfig(**settings))
    scores = Masks(callback)
    as_on_a_gpu(make_trainer(tiny_bert(**NO_DROPOUT), data, [callback, scores], **args)).train()
    assert len(scores.scores) == len(recorder.gradients) == 2
    for step, gradients in zip(scores.scores, recorder.gradients, strict=True):
        expected = {}
        for layer in range(2):
            prefix = f"bert.encoder.layer.{layer}"
            for group, name in (("ffn", "output"), ("attention.heads", "attention.output")):
                weight = f"{prefix}.{name}.dense.weight"
                columns = (weights[weight] * gradients[weight]).sum(0)
                expected[f"{prefix}.{group}"] = columns.view(len(step[f"{prefix}.{group}"]), -1).sum(1).abs()
        # bf16 has 8 bits, fp16 11; sums over a batch and over a unit's weights are rounded at different places.
        assert distance(step, expected) < {"bf16": 0.03, "fp16": 0.004}.get(option, 1e-5)
