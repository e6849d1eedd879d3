"""Training options end in a model that shrinks and evaluates as the Trainer's own; distillation under each of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantized_models import fake_quantized_modules
from training_runs import (
    DELICATE,
    METHODS,
    NO_DROPOUT,
    NUM_EXAMPLES,
    OPTIONS,
    Recorder,
    as_on_a_gpu,
    compression,
    distance,
    instrumented,
    same,
    slow_unless,
)
from transformers import Trainer

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    enable_quantizers,
    shrink,
)
from hf_compress.instruments.fake_quantize import quantizable_layers
from hf_compress.instruments.pruner_state import scores_of

CASES = [
    slow_unless(method == "all" and option in DELICATE, option, method, name=f"{option}, {method}")
    for option in OPTIONS
    for method in METHODS
]


@pytest.mark.parametrize(("option", "method"), CASES)
def test_options_end_in_a_model_that_evaluates_as_the_trainers_own(
    tiny_bert: Any, classification_data: Any, make_trainer: Any, option: str, method: str
) -> None:
    data = classification_data(NUM_EXAMPLES)
    callbacks = compression(METHODS[method], tiny_bert(seed=1))
    trainer = make_trainer(tiny_bert(), data, callbacks, **{"max_steps": 4, **OPTIONS[option]})
    as_on_a_gpu(trainer).train()
    for callback in callbacks:
        assert bool(instrumented(trainer.model)) == (method in ("quantization", "all"))
        if isinstance(callback, QuantizationCallback):
            callback.detach()
    own = trainer.evaluate()["eval_loss"]
    pruning, *_ = [*(each for each in callbacks if isinstance(each, PruningCallback)), None]
    if pruning is not None:
        masks = pruning.masks()
        assert sum(int(mask.sum()) for name, mask in masks.items() if "heads" in name) == 4
        assert sum(int(mask.sum()) for name, mask in masks.items() if "ffn" in name) == 48
        small = shrink(trainer)
        # A Trainer with the same options, so that autocast and smoothing are the same.
        other = as_on_a_gpu(Trainer(small, trainer.args, eval_dataset=data)).evaluate()["eval_loss"]
        # In half precision, sums over fewer columns are rounded differently.
        assert other == pytest.approx(own, rel={"bf16": 1e-2, "fp16": 1e-3}.get(option, 1e-5))
        assert trainer.evaluate()["eval_loss"] == own  # shrinking left the Trainer's model alone, autocast included


def test_fake_quantization_of_the_shrunk_model_is_the_trainers_own(
    tiny_bert: Any, classification_data: Any, make_trainer: Any
) -> None:
    """In float64, where hardly any value is so near to the middle of two integers that rounding errors decide."""
    trainer = make_trainer(tiny_bert(), classification_data(), compression(METHODS["all"], tiny_bert(seed=1)))
    trainer.train()
    small = shrink(trainer).double()
    assert fake_quantized_modules(small) == list(quantizable_layers(small))
    enable_quantizers(small)
    ids = torch.arange(3, 33).view(3, 10)
    with torch.no_grad():
        own = trainer.model.double().eval()(input_ids=ids).logits
        torch.testing.assert_close(small(input_ids=ids).logits, own, rtol=1e-6, atol=1e-6)


ALPHA, TEMPERATURE = 0.7, 3.0


class ByHand(Trainer):
    """The reference: distillation as people write it, in a subclass."""

    teacher: Any

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True, **kwargs)
        if not model.training:
            return (loss, outputs) if return_outputs else loss
        with torch.no_grad(), self.accelerator.autocast():
            theirs = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        q, p = (F.softmax(logits.float() / TEMPERATURE, dim=-1) for logits in (outputs.logits, theirs))
        divergence = TEMPERATURE**2 * (p * (p / q).log()).sum(-1).mean()
        mixed = (1 - ALPHA) * loss + ALPHA * divergence
        return (mixed, outputs) if return_outputs else mixed


@pytest.mark.parametrize(
    "option", [slow_unless(option in (*DELICATE, "noisy embeddings"), option, name=option) for option in OPTIONS]
)
def test_distillation_is_the_one_of_a_subclass(
    tiny_bert: Any, classification_data: Any, make_trainer: Any, option: str
) -> None:
    """Whole runs; with a plain optimizer, since Adam makes steps of full size out of gradients that are mere noise."""
    args = {"max_steps": 4, "learning_rate": 0.1, **OPTIONS[option], "optim": "sgd"}
    data, runs = classification_data(NUM_EXAMPLES), []
    for by_hand in (True, False):
        teacher, recorder = tiny_bert(seed=1, hidden_size=16).eval(), Recorder()
        config = DistillationConfig(alpha=ALPHA, temperature=TEMPERATURE)
        callbacks = [] if by_hand else [DistillationCallback(config, teacher)]
        student = tiny_bert(**({} if option != "noisy embeddings" else NO_DROPOUT))
        trainer = make_trainer(
            student, data, [*callbacks, recorder], trainer_class=ByHand if by_hand else Trainer, **args
        )
        trainer.teacher = teacher
        as_on_a_gpu(trainer).train()
        runs.append(recorder)
    for a, b in zip(runs[0].gradients, runs[1].gradients, strict=True):
        assert distance(b, a) < (1e-2 if option in ("bf16", "fp16") else 1e-5)
    assert not same(runs[0].weights[0], runs[0].weights[-1])


def test_scores_and_masks_do_not_depend_on_the_loss_scale(
    tiny_bert: Any, classification_data: Any, make_trainer: Any
) -> None:
    """The scaler of fp16 without its autocast: powers of two change no digit, so that all is bit for bit the same."""
    runs = []
    for scale in (None, 2.0**10):
        settings = {"structures": {"heads": 0.5, "ffn": 0.5}, "begin": 1, "end": 3, "update_every": 1}
        callback = PruningCallback(PruningConfig(**settings))
        recorder = Recorder()
        # Without fp16, accelerate does not take the scale off before it clips.
        options = {"max_grad_norm": 0.0}
        trainer = make_trainer(tiny_bert(), classification_data(NUM_EXAMPLES), [callback, recorder], **options)
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        runs.append((recorder, callback))
    (plain, pruned), (scaled, pruned_scaled) = runs
    assert all(map(same, plain.weights, scaled.weights))
    assert same(scores_of(pruned._pruner), scores_of(pruned_scaled._pruner))
    assert same(pruned.masks(), pruned_scaled.masks())


class Overflows(Trainer):
    """The loss of the second step is infinite."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("inf") if self.state.global_step == 1 and self.model.training else loss


def test_a_step_with_overflow_is_skipped(tiny_bert: Any, classification_data: Any, make_trainer: Any) -> None:
    scores = []

    class Keep(Recorder):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, model=model)
            scores.append({name: score.clone() for name, score in scores_of(callback._pruner).items()})

    callback, keep = compression(["pruning"])[0], Keep()
    data = classification_data(NUM_EXAMPLES)
    trainer = make_trainer(tiny_bert(), data, [callback, keep], trainer_class=Overflows, fp16=True)
    as_on_a_gpu(trainer).train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**9
    assert same(keep.weights[0], keep.weights[1]) and not same(keep.weights[1], keep.weights[2])
    assert same(scores[0], scores[1]) and not same(scores[1], scores[2])
    assert shrink(trainer).num_parameters() < 0.9 * trainer.model.num_parameters()
