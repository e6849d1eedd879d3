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


@pytest.mark.parametrize(
    ("name", "has_tokens"),
    [("llama", True), ("bert_mlm", True), ("t5", True), ("wav2vec2", True), ("bert", False), ("bert_tokens", False),
     ("bert_qa", False), ("vit", False)],
)  # fmt: skip
def test_classes_are_tokens_of_language_models_and_of_speech(name: str, has_tokens: bool) -> None:
    assert head_of(ALL[name]()).has_tokens == has_tokens


def several(problem_type: str | None = None, num_labels: int = 3) -> Head:
    model = ALL["bert"]()
    model.config.num_labels, model.config.problem_type = num_labels, problem_type
    return Head(model)


LOGITS, CLASSES = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("problem_type", "logits", "labels", "expected", "loss"),
    [
        (None, LOGITS, CLASSES, "single_label_classification", "kl"),
        (None, LOGITS, None, "single_label_classification", "kl"),
        (None, LOGITS, torch.zeros(4, 3), "multi_label_classification", "binary_kl"),
        (None, LOGITS, torch.zeros(4, 3, dtype=torch.long), "single_label_classification", "kl"),
        (None, LOGITS[:, :2], CLASSES, "single_label_classification", "kl"),
        (None, LOGITS[:, :1], torch.zeros(4), "regression", "mse"),
        ("regression", LOGITS, torch.zeros(4, 3), "regression", "mse"),
        ("multi_label_classification", LOGITS[:, :1], CLASSES, "multi_label_classification", "binary_kl"),
        (None, torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), None, "kl"),
    ],
)
def test_the_problem_type_says_which_loss_is_meant(problem_type, logits, labels, expected, loss) -> None:
    head = several(problem_type)
    assert head.problem_type(logits, labels) == expected
    assert head.loss_name("auto", logits, labels) == loss
    assert head.loss_name("mse", logits, labels) == "mse"
    if loss == "kl":
        assert head.loss_name("ce", logits, labels) == "ce"
        assert head.counted(logits, {}, None, shift=False).all()
    else:
        assert head.loss_name(loss, logits, labels) == loss
        with pytest.raises(ConfigError, match=f"got 'kl'.*student's task is {expected}"):
            head.loss_name("kl", logits, labels)
        assert head.counted(logits, {}, labels, shift=False).tolist() == [True] * 4


def test_heads_of_other_kinds_have_no_problem_type() -> None:
    for name in ("llama", "vilt"):
        head = Head(ALL[name]())
        assert head.problem_type(LOGITS, CLASSES) is None and not head.is_regression()


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "expected"),
    [(None, 1, True), (None, 2, False), ("regression", 3, True), ("single_label_classification", 1, False)],
)
def test_regression_is_known_from_the_config(problem_type, num_labels, expected) -> None:
    assert several(problem_type, num_labels).is_regression() is expected


@pytest.mark.parametrize(("name", "shifts"), [("llama", True), ("bert_mlm", False), ("bart", False), ("bert", False)])
def test_causal_models_alone_predict_the_next_token(name, shifts) -> None:
    assert Head(ALL[name]()).shift is shifts


def test_padding_is_no_end_of_an_answer() -> None:
    head = SpanHead(BertForQuestionAnswering(ALL["bert"]().config))
    outputs = {"start_logits": torch.ones(2, 3), "end_logits": torch.full((2, 3), 2.0)}
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    logits = head.logits(outputs, {"attention_mask": mask}, "teacher")
    assert logits.tolist()[0] == [[1.0, 1.0, -torch.inf], [2.0, 2.0, -torch.inf]]
    assert logits[1].isfinite().all()
    assert head.logits(outputs, {"attention_mask": mask[:, :2]}, "teacher").isfinite().all()
    assert head.counted(logits, {}, None, shift=False).tolist() == [[True, True]] * 2
    for wrong in ({"start_logits": torch.ones(2, 3)}, (1, 2)):
        with pytest.raises(TrainingError, match=r"the teacher returned .* instead of start_logits and end_logits"):
            head.logits(wrong, {}, "teacher")


@pytest.mark.parametrize(("outputs", "text"), [({"loss": 1}, r"only \['loss'\]"), ((1, 2), "a tuple")])
def test_outputs_without_logits_are_described(outputs, text) -> None:
    with pytest.raises(TrainingError, match=f"the student returned {text} instead of a ModelOutput with logits"):
        several().logits(outputs, {}, "student")


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
