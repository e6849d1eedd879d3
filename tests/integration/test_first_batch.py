"""What distillation compares before the first step: errors come early, and no example of a stream is lost."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from features_by_hand import config, examples, models
from torch import Tensor
from torch.utils.data import IterableDataset
from training_runs import NO_DROPOUT, Recorder, StopAt, same
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
)

from hf_compress import (
    ConfigError,
    DistillationCallback,
    DistillationConfig,
    QuantizationCallback,
    QuantizationConfig,
    TrainingError,
    preview,
)
from hf_compress.config import FeatureConfig

WIDER = {"hidden_size": 48, "num_attention_heads": 4}


class Once(IterableDataset[Any]):
    """Examples that come once; ``wrapped`` hides it behind generators."""

    def __init__(self, given: list[dict[str, Tensor]], wrapped: bool) -> None:
        self.left = iter(given)
        self.wrapped = wrapped

    def __iter__(self) -> Iterator[Any]:
        return (each for each in self.left) if self.wrapped else self.left


def inputs_seen(student: Any) -> list[Tensor]:
    """Return a list that gains the inputs of every forward pass that is trained with."""
    seen: list[Tensor] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            seen.append(kwargs["input_ids"])

    student.register_forward_pre_hook(look, with_kwargs=True)
    return seen


def test_outputs_that_cannot_be_compared_are_errors_before_training(make_trainer: Any) -> None:
    student, teacher = models("bert")
    seen = inputs_seen(student)

    def shorten(module: Any, args: Any, outputs: Any) -> None:
        outputs["logits"] = outputs.logits[:, :2]

    teacher.register_forward_hook(shorten)
    with pytest.raises(TrainingError, match="logits"):
        make_trainer(student, examples("bert"), [DistillationCallback(DistillationConfig(), teacher)]).train()
    assert not seen


def test_a_trainer_that_changes_batches_is_left_alone_until_it_has(make_trainer: Any) -> None:
    class Renames(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, {**inputs, "labels": inputs["labels"] % 3}, *args, **kwargs)

    student, teacher = models("bert")
    data = [{**each, "labels": each["labels"] + 3} for each in examples("bert")]  # the model has no such labels
    callbacks = [DistillationCallback(DistillationConfig(), teacher)]
    make_trainer(student, data, callbacks, trainer_class=Renames).train()


def test_labels_that_only_the_trainers_loss_reads_are_not_given_to_the_model(make_trainer: Any) -> None:
    def loss(outputs: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels - 3)

    student, teacher = models("bert")
    data = [{**each, "labels": each["labels"] + 3} for each in examples("bert")]  # the model has no such labels
    make_trainer(
        student,
        data,
        [DistillationCallback(DistillationConfig(), teacher)],
        trainer_options={"compute_loss_func": loss},
    ).train()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_a_stream_loses_no_example(make_trainer: Any, features: bool, wrapped: bool) -> None:
    student, teacher = models("bert", teacher=WIDER if features else {})
    settings = config("hidden_mse") if features else DistillationConfig()
    data, seen = examples("bert", 16), inputs_seen(student)
    trainer = make_trainer(student, Once(data, wrapped), [DistillationCallback(settings, teacher)])
    told = preview(trainer).sections["distillation"]
    assert not any("loss" in name for name in told)
    trainer.train()
    assert torch.equal(torch.cat(seen), torch.stack([each["input_ids"] for each in data]))


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_a_stream_trains_like_a_list(make_trainer: Any) -> None:
    """Maps start from the first batch that is trained with."""
    student, teacher = models("bert", teacher=WIDER)
    found = []
    for made in (examples("bert", 16), Once(examples("bert", 16), wrapped=True)):
        recorder, callback = Recorder(), DistillationCallback(config("hidden_mse"), teacher)
        make_trainer(copy.deepcopy(student), made, [callback, recorder], trainer_class=InOrder).train()
        found.append(recorder.gradients)
    assert len(found[0]) == len(found[1]) == 4
    assert all(same(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("outside", ["label_smoother", "compute_loss_func"])
def test_a_stream_trains_like_a_list_where_the_loss_is_computed_after_the_model(
    make_trainer: Any, outside: str
) -> None:
    """Maps are made between the forward pass and the backward pass, which needs BERT's buffers as they were."""
    student, teacher = models("bert", teacher=WIDER)
    args = {"label_smoothing_factor": 0.1} if outside == "label_smoother" else {}
    options: dict[str, Any] = {"trainer_class": InOrder}
    if outside == "compute_loss_func":
        options["trainer_options"] = {"compute_loss_func": _cross_entropy}
    found = []
    for made in (examples("bert", 16), Once(examples("bert", 16), wrapped=True)):
        recorder, callback = Recorder(), DistillationCallback(config("hidden_mse"), teacher)
        make_trainer(copy.deepcopy(student), made, [callback, recorder], **options, **args).train()
        found.append(recorder.gradients)
    assert len(found[0]) == len(found[1]) == 4
    assert all(same(a, b) for a, b in zip(*found, strict=True))


def _cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


def test_maps_of_a_stream_are_fitted_without_the_padding_of_a_decoder(make_trainer: Any) -> None:
    """The Trainer's label smoother gets the labels, which show it, and the model does not."""
    student, teacher = models("bart", teacher={"d_model": 48})
    data = examples("bart", 16)
    for example in data:
        example["decoder_input_ids"] = example["labels"].roll(1).clamp(min=0)
    found = []
    for made in (data, Once(data, wrapped=True)):
        recorder, callback = Recorder(), DistillationCallback(config("hidden_mse"), teacher)
        args = {"label_smoothing_factor": 0.1, "max_steps": 1}
        make_trainer(copy.deepcopy(student), made, [callback, recorder], trainer_class=InOrder, **args).train()
        found.append(recorder.gradients)
    assert len(found[0]) == 1
    assert same(found[0][0], found[1][0])


def test_a_loader_that_goes_on_where_it_was_loses_no_batch(make_trainer: Any) -> None:
    class GoesOn:
        def __init__(self, batches: list[Any]) -> None:
            self.left = iter(batches)

        def __iter__(self) -> Any:
            return self.left

        def __len__(self) -> int:
            return 4

    student, teacher = models("bert")
    data, seen = examples("bert", 16), inputs_seen(student)
    batches = [
        {name: torch.stack([each[name] for each in data[i : i + 4]]) for name in data[0]} for i in range(0, 16, 4)
    ]
    loader = GoesOn(batches)

    class Custom(Trainer):
        def get_train_dataloader(self) -> Any:
            return loader

    callbacks = [DistillationCallback(DistillationConfig(), teacher)]
    make_trainer(student, data, callbacks, trainer_class=Custom, max_steps=4).train()
    assert torch.equal(torch.cat(seen), torch.cat([each["input_ids"] for each in batches]))


def test_a_teacher_with_too_few_positions_says_so(make_trainer: Any) -> None:
    student, teacher = models("bert", teacher={"max_position_embeddings": 4})
    with pytest.raises(TrainingError, match="has 4 positions, but texts of this batch are 7 tokens long"):
        make_trainer(student, examples("bert"), [DistillationCallback(DistillationConfig(), teacher)]).train()


class Again(Once):
    """A stream that starts over, as one has to that training resumes with."""

    def __init__(self, given: list[dict[str, Tensor]]) -> None:
        self.given = given

    def __iter__(self) -> Iterator[Any]:
        return iter(self.given)


def test_a_stream_resumes_as_a_straight_run(make_trainer: Any) -> None:
    """Law 5: maps of the checkpoint are taken over once there are some."""
    student, teacher = models("bert", teacher=WIDER)
    args = {"save_strategy": "steps", "save_steps": 2}
    ends = []
    for more in ((StopAt(2),), ()):
        callbacks = [DistillationCallback(config("hidden_mse"), teacher), *more]
        trainer = make_trainer(copy.deepcopy(student), Again(examples("bert", 16)), callbacks, **args)
        if more:
            trainer.train()
        else:
            trainer.train(resume_from_checkpoint=True)
        ends.append(trainer)
    straight = make_trainer(
        copy.deepcopy(student), Again(examples("bert", 16)), [DistillationCallback(config("hidden_mse"), teacher)]
    )
    straight.train()
    assert ends[1].state.global_step == straight.state.global_step == 4
    assert same(ends[1].model.state_dict(), straight.model.state_dict())


@pytest.mark.parametrize(
    ("changes", "teacher"),
    [({}, WIDER), ({"projection": "always"}, {})],
)
def test_a_learning_rate_of_maps_is_read_where_there_are_some(make_trainer: Any, changes: Any, teacher: Any) -> None:
    student, teacher = models("bert", teacher=teacher)
    settings = config("hidden_mse", learning_rate=0.1, **changes)
    make_trainer(student, examples("bert"), [DistillationCallback(settings, teacher)]).train()


def test_a_learning_rate_without_maps_is_refused(make_trainer: Any) -> None:
    student, teacher = models("bert")
    features = (FeatureConfig(loss="hidden_mse", projection="always"), FeatureConfig(loss="fsp", learning_rate=0.1))
    with pytest.raises(ConfigError, match=r"learning_rate: got 0\.1; allowed: 0\.001 for 'fsp', which needs no proj"):
        make_trainer(
            student, examples("bert"), [DistillationCallback(DistillationConfig(features=features), teacher)]
        ).train()


def test_the_student_as_it_is_teaches_nothing_unless_training_changes_it(make_trainer: Any, tiny_bert: Any) -> None:
    settings, data = DistillationConfig(), examples("bert")
    student, _ = models("bert")
    with pytest.raises(ConfigError, match="teacher='unmasked', but no callback masks or quantizes, and there is no"):
        make_trainer(student, data, [DistillationCallback(settings, "unmasked")]).train()
    quantizes = QuantizationCallback(QuantizationConfig(begin=0))
    for callbacks, dropout in (([quantizes], NO_DROPOUT), ([], {"hidden_dropout_prob": 0.1})):
        student, _ = models("bert", **dropout)
        trainer = make_trainer(student, data, [DistillationCallback(settings, "unmasked"), *callbacks], max_steps=1)
        trainer.train()
        assert trainer.state.global_step == 1


@pytest.mark.parametrize("kind", ["bert", "gpt2", "distilbert"])
def test_dropout_that_only_the_config_has_changes_nothing(make_trainer: Any, kind: str) -> None:
    """Configs keep rates that models have been freed of, and of heads that they have not."""
    student = dropping(kind)
    data = [{**each, "labels": each["input_ids"]} if kind == "gpt2" else each for each in examples("bert")]
    args = {"max_steps": 1, "per_device_train_batch_size": 2}
    callback = DistillationCallback(DistillationConfig(), "unmasked")
    make_trainer(copy.deepcopy(student), data, [callback], **args).train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with pytest.raises(ConfigError, match="teacher='unmasked', but no callback masks or quantizes, and there is no"):
        make_trainer(student, data, [DistillationCallback(DistillationConfig(), "unmasked")], **args).train()


def dropping(kind: str) -> Any:
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 97, "n_positions": 16}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    if kind == "distilbert":
        sizes = {"dim": 32, "hidden_dim": 44, "n_layers": 1, "n_heads": 4, "vocab_size": 97, "num_labels": 3}
        return DistilBertForSequenceClassification(DistilBertConfig(**sizes))
    return models("bert", hidden_dropout_prob=0.1, num_hidden_layers=1)[0]
