"""Which head reads which model, and heads that cannot be read."""

import pytest
import torch
from transformers import BertForQuestionAnswering, ElectraForPreTraining
from zoo import ALL

from hf_compress.callbacks.distillation import DistillationCallback
from hf_compress.callbacks.heads import Head, SpanHead, head_of
from hf_compress.config import DistillationConfig
from hf_compress.errors import ConfigError, TrainingError


def test_spans_are_read_of_models_that_return_spans() -> None:
    config = ALL["bert"]().config
    assert type(head_of(BertForQuestionAnswering(config))) is SpanHead

    class Own(BertForQuestionAnswering):
        pass

    assert type(head_of(Own(config))) is SpanHead
    assert type(head_of(ALL["vilt"]())) is Head


def answers_about_images(seed: int) -> list[dict[str, torch.Tensor]]:
    model = ALL["vilt"]()
    inputs = ALL["vilt"].example_inputs(model)
    labels = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed))
    return [{**{name: value[i] for name, value in inputs.items()}, "labels": labels[i]} for i in range(2)]


def test_answers_about_images_are_several_labels(make_trainer) -> None:
    data = answers_about_images(0)
    teacher = ALL["vilt"]()
    teacher.classifier[-1].bias.data += torch.tensor([1.0, -1.0, 0.5])
    losses = {}
    for loss in ("auto", "binary_kl"):
        callback = DistillationCallback(DistillationConfig(loss=loss), teacher)
        trainer = make_trainer(ALL["vilt"](), data, [callback], logging_strategy="steps", logging_steps=1, max_steps=1)
        trainer.train()
        losses[loss] = trainer.state.log_history[0]["distillation_loss"]
    assert 0 < losses["auto"] == losses["binary_kl"]
    trainer = make_trainer(ALL["vilt"](), data, [DistillationCallback(DistillationConfig(loss="kl"), teacher)])
    with pytest.raises(ConfigError, match=r"loss: got 'kl'.*multi_label_classification\. Allowed: 'binary_kl'"):
        trainer.train()


def test_one_number_for_each_position_is_no_distribution(make_trainer, language_data) -> None:
    def electra() -> ElectraForPreTraining:
        return ALL["electra_discriminator"]()

    data = [{**each, "labels": each["labels"] % 2} for each in language_data()]
    trainer = make_trainer(electra(), data, [DistillationCallback(DistillationConfig(), electra())])
    with pytest.raises(
        TrainingError, match=r"ElectraForPreTraining returns one number for each position, .*no dimension of classes"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
