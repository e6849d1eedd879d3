"""What would go wrong in silence: dead losses, teachers that are no numbers, noise taken for something else."""

import copy

import numpy
import pytest
import torch
from training_runs import NO_DROPOUT
from transformers import Trainer, TrainerCallback

from hf_compress import ConfigError, DistillationCallback, DistillationConfig, TrainingError, cache_teacher_outputs

HIDDEN = ({"loss": "hidden_mse", "layers": {0: 0}},)


@pytest.mark.parametrize("loss", [None, "kl"])
@pytest.mark.parametrize("projection", ["where needed", "always"])
def test_a_feature_of_frozen_layers_is_refused(tiny_bert, classification_data, make_trainer, loss, projection) -> None:
    student = tiny_bert()
    student.bert.embeddings.requires_grad_(False)
    student.bert.encoder.layer[0].requires_grad_(False)
    features = [{**HIDDEN[0], "projection": projection}]
    callback = DistillationCallback(DistillationConfig(loss=loss, features=features), tiny_bert(seed=1))
    with pytest.raises(TrainingError, match=r"layers \[0\] of the student's encoder get no gradient"):
        make_trainer(student, classification_data(), [callback]).train()
    later = DistillationConfig(features=[{"loss": "hidden_mse", "layers": {1: 1}}])
    make_trainer(student, classification_data(), [DistillationCallback(later, tiny_bert(seed=1))]).train()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_student_without_a_trainable_parameter_is_refused(
    tiny_bert, classification_data, make_trainer, smoothing
) -> None:
    student = tiny_bert().requires_grad_(False)
    callback = DistillationCallback(DistillationConfig(), tiny_bert(seed=1))
    trainer = make_trainer(student, classification_data(), [callback], label_smoothing_factor=smoothing)
    with pytest.raises(TrainingError, match="all of its parameters are frozen"):
        trainer.train()


class Nothing(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        own = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return own + 0.0 * outputs.loss


def test_a_loss_that_is_multiplied_by_zero_is_refused(tiny_bert, classification_data, make_trainer) -> None:
    callback = DistillationCallback(DistillationConfig(), tiny_bert(seed=1))
    trainer = make_trainer(tiny_bert(), classification_data(), [callback], trainer_class=Nothing)
    with pytest.raises(TrainingError, match="multiplied by 0"):
        trainer.train()


class Spoil(TrainerCallback):
    """Makes a teacher's weight NaN at the end of a step."""

    def __init__(self, teacher, step):
        self.teacher, self.step = teacher, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.teacher.classifier.bias.data[0] = float("nan")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["classifier.bias", "bert.encoder.layer.0.output.dense.bias"])
def test_a_teacher_that_is_no_number_is_refused(tiny_bert, classification_data, make_trainer, value, where) -> None:
    teacher, student = tiny_bert(seed=1), tiny_bert()
    teacher.get_parameter(where).data[0] = value
    config = DistillationConfig() if "classifier" in where else DistillationConfig(loss=None, features=HIDDEN)
    trainer = make_trainer(student, classification_data(), [DistillationCallback(config, teacher)])
    with pytest.raises(TrainingError, match="NaN or infinite"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "options", [{"save_strategy": "steps", "save_steps": 6}, {"logging_strategy": "steps", "logging_steps": 6}]
)
def test_one_that_is_none_later_spoils_no_checkpoint(
    tiny_bert, classification_data, make_trainer, tmp_path, options
) -> None:
    teacher = tiny_bert(seed=1)
    callbacks = [DistillationCallback(DistillationConfig(), teacher), Spoil(teacher, 4)]
    trainer = make_trainer(tiny_bert(), classification_data(32), callbacks, max_steps=8, **options)
    with pytest.raises(TrainingError, match="NaN or infinite"):
        trainer.train()
    assert trainer.state.global_step == 6


def test_projections_fit_as_well_under_autocast(tiny_bert, classification_data, make_trainer) -> None:
    found = {}
    for name, options in {"single": {}, "half": {"bf16": True}}.items():
        callback = DistillationCallback(
            DistillationConfig(loss=None, features=[{"loss": "hidden_mse"}]), tiny_bert(seed=1, hidden_size=48)
        )
        trainer = make_trainer(
            tiny_bert(**NO_DROPOUT),
            classification_data(16),
            [callback],
            logging_strategy="steps",
            logging_steps=1,
            **options,
        )
        trainer.train()
        found[name] = [
            entry["distillation_loss"] for entry in trainer.state.log_history if "distillation_loss" in entry
        ]
    assert found["half"][1] == pytest.approx(found["single"][1], rel=0.1)


def test_the_largest_logits_teach_no_independent_labels(tiny_bert, classification_data, make_trainer, tmp_path) -> None:
    sizes = {"num_labels": 5, "problem_type": "multi_label_classification"}
    data = [{**each, "labels": torch.eye(5)[each["labels"]]} for each in classification_data(8)]
    cache = cache_teacher_outputs(
        tiny_bert(seed=1, **sizes), make_trainer(tiny_bert(**sizes), data), tmp_path / "cache", top_k=4, temperature=2.0
    )
    trainer = make_trainer(tiny_bert(**sizes), data, [DistillationCallback(DistillationConfig(), cache)])
    with pytest.raises(ConfigError, match="compares logits by 'binary_kl'"):
        trainer.train()


def test_teachers_with_projections_of_their_own_keep_their_order(
    tiny_bert, classification_data, make_trainer, tmp_path
) -> None:
    teachers = [tiny_bert(seed=seed, hidden_size=48) for seed in (1, 2)]
    config = DistillationConfig(features=[{"loss": "hidden_mse"}])
    options = {"save_strategy": "steps", "save_steps": 2}
    data = classification_data(16)
    make_trainer(tiny_bert(), data, [DistillationCallback(config, teachers)], **options).train()
    again = make_trainer(tiny_bert(), data, [DistillationCallback(config, teachers[::-1])], **options)
    with pytest.raises(TrainingError, match="another teacher"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def noisy(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
    (gradient,) = torch.autograd.grad(loss, outputs.logits, create_graph=True)
    return loss * float(numpy.random.uniform(0.5, 1.5)) + 0.1 * gradient.square().sum()


def test_noise_is_no_dependence_on_the_number_of_items(tiny_bert, classification_data, make_trainer) -> None:
    """A mean of the micro-batch stays one, although the function draws numbers and differentiates."""
    callback = DistillationCallback(DistillationConfig(), tiny_bert(seed=1))
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(callback._mixer.per_item)

    trainer = make_trainer(
        copy.deepcopy(tiny_bert()),
        classification_data(32),
        [callback, Look()],
        trainer_options={"compute_loss_func": noisy},
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert seen[0] is False
