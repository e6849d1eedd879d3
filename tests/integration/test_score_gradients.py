"""Scores from the distillation loss alone."""

import pytest
import torch
from training_runs import as_on_a_gpu
from transformers import TrainerCallback

from hf_compress import (
    ConfigError,
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    TrainingError,
)


class Scores(TrainerCallback):
    """Keeps the scores of the first steps."""

    def __init__(self, pruning):
        self.pruning, self.seen = pruning, []

    def on_step_end(self, args, state, control, **kwargs):
        pruner = self.pruning._pruner
        self.seen.append({name: pruner.pools[0].method.tensors[name].clone() for name in pruner.pools[0].layers})


def pruning(**changes):
    settings = {"structures": {"ffn": 0.5}, "criterion": "grain", "begin": 2, "end": 3, "update_every": 1}
    return PruningCallback(PruningConfig(**{**settings, **changes}))


@pytest.fixture
def run(tiny_bert, classification_data, make_trainer):
    def train(gradients, alpha, on_gpu=False, features=True, **options):
        callback = pruning(gradients=gradients)
        scores = Scores(callback)
        features = [{"loss": "hidden_mse"}] if gradients == "distillation" and features else []
        teaching = DistillationCallback(DistillationConfig(alpha=alpha, features=features), tiny_bert(seed=1))
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        trainer = make_trainer(model, classification_data(32), [callback, scores, teaching], **options)
        (as_on_a_gpu(trainer) if on_gpu else trainer).train()
        return scores.seen[0]

    return train


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=str,
)
def test_neither_the_task_nor_features_move_the_scores(run, options) -> None:
    """The first step's scores are alpha times those of a run that is trained with the loss of logits alone."""
    alone = run("training", 1.0, **options)
    separate = run("distillation", 0.25, **options)
    mixed = run("training", 0.25, **options)
    for name, scores in alone.items():
        torch.testing.assert_close(separate[name], 0.25 * scores, rtol=2e-2 if "bf16" in options else 1e-4, atol=1e-9)
        assert not torch.allclose(mixed[name], 0.25 * scores, rtol=0.05)


def test_the_loss_of_logits_may_be_the_only_one(run) -> None:
    with_features, without = run("distillation", 0.25), run("distillation", 0.25, features=False)
    for name, scores in with_features.items():
        torch.testing.assert_close(without[name], scores, rtol=1e-5, atol=1e-9)


def test_the_loss_scale_of_fp16_is_divided_out(run) -> None:
    half, single = run("distillation", 0.25, on_gpu=True, fp16=True), run("distillation", 0.25)
    for name, scores in single.items():
        torch.testing.assert_close(half[name], scores, rtol=5e-2, atol=1e-6)


def test_reentrant_checkpointing_is_refused(run) -> None:
    with pytest.raises(TrainingError, match="use_reentrant=False"):
        run("distillation", 0.5, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})


def test_without_a_loss_of_logits_it_is_refused(tiny_bert, classification_data, make_trainer) -> None:
    features = DistillationConfig(loss=None, features=[{"loss": "hidden_mse"}])
    for others in ([], [DistillationCallback(features, tiny_bert(seed=1))]):
        trainer = make_trainer(tiny_bert(), classification_data(), [pruning(gradients="distillation"), *others])
        with pytest.raises(ConfigError, match="no DistillationCallback that compares logits"):
            trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criterion": "l2"}, "reads no gates"),
        ({"criterion": "taylor", "structures": {"weights": 0.5}}, "single weights"),
        ({"gradients": "task"}, "unknown value 'task'"),
    ],
)
def test_settings_without_effect_are_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        pruning(**{"gradients": "distillation", **changes})
