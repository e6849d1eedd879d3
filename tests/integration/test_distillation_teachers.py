"""Teachers: where they come from, and which are refused before training."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from hf_compress.callbacks.distillation import DistillationCallback
from hf_compress.config import DistillationConfig
from hf_compress.errors import ConfigError, TrainingError

CONFIG = DistillationConfig(alpha=0.7, temperature=3.0)


class Steps(TrainerCallback):
    """Counts optimizer steps."""

    num_steps = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.num_steps += 1


@pytest.fixture
def pair(tiny_bert: Any, classification_data: Any) -> Callable[[], tuple[Any, Any, Any]]:
    """``pair()`` gives student, teacher and data."""
    return lambda: (tiny_bert(), tiny_bert(seed=1, hidden_size=16), classification_data())


def test_a_teacher_by_name_teaches_like_the_model_itself(
    make_trainer: Any, tiny_bert: Any, pair: Any, tmp_path: Path
) -> None:
    _, teacher, data = pair()
    teacher.save_pretrained(tmp_path / "teacher")
    students = []
    for given in (teacher, str(tmp_path / "teacher"), tmp_path / "teacher"):
        student = tiny_bert()
        make_trainer(student, data, [DistillationCallback(CONFIG, given)]).train()
        students.append(student)
    for other in students[1:]:
        assert all(map(torch.equal, students[0].parameters(), other.parameters()))


def test_another_architecture_can_teach(make_trainer: Any, pair: Any, tmp_path: Path) -> None:
    """Inputs that the teacher does not know (token_type_ids) are left out."""

    student, _, data = pair()
    config = DistilBertConfig(
        vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=16, num_labels=3
    )
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    data = [{**example, "token_type_ids": torch.zeros(10, dtype=torch.long)} for example in data]
    make_trainer(student, data, [DistillationCallback(CONFIG, tmp_path / "teacher")]).train()


def named(model: Any, *names: str) -> Any:
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def sharing(student: Any, teacher: Any) -> Any:
    teacher.classifier = student.classifier
    return teacher


def problem(student: Any, kind: str) -> Any:
    student.config.problem_type = kind
    return student


BAD_TEACHERS: dict[str, tuple[Callable[..., Any], str]] = {
    "other number of labels": (lambda s, make: make(num_labels=4), "teacher has 4 labels, the student 3"),
    "other order of labels": (
        lambda s, make: (named(s, "no", "maybe", "yes"), named(make(), "yes", "maybe", "no"))[1],
        r"labels are \['yes', 'maybe', 'no'\], the student's \['no', 'maybe', 'yes'\]",
    ),
    "other vocabulary": (lambda s, make: make(vocab_size=60), "vocabulary has 60 tokens, the student's 50"),
    "the student itself": (lambda s, make: s, "shares 41 parameters with the student"),
    "a part of the student": (lambda s, make: sharing(s, make()), "first: classifier.weight"),
    "another kind of task": (
        lambda s, make: (problem(s, "regression"), problem(make(), "single_label_classification"))[1],
        "teacher's problem_type is 'single_label_classification', the student's 'regression'",
    ),
    "no Transformers model": (
        lambda s, make: nn.Linear(2, 3),
        "the teacher is a Linear; allowed: a transformers",
    ),
    "no values": (lambda s, make: make().to("meta"), "weights without values, on the meta device"),
    "no such folder": (lambda s, make: "no/such/folder/anywhere", "cannot be loaded"),
}


@pytest.mark.parametrize("case", BAD_TEACHERS)
def test_a_teacher_that_cannot_teach_is_refused_before_training(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, tmp_path: Path, case: str
) -> None:
    choose, message = BAD_TEACHERS[case]
    student = tiny_bert()
    teacher = choose(student, lambda **sizes: tiny_bert(seed=1, **sizes))
    before = copy.deepcopy(student.state_dict())
    trainer = make_trainer(student, classification_data(), [DistillationCallback(CONFIG, teacher)])
    steps = Steps()
    trainer.add_callback(steps)
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert steps.num_steps == 0
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not student._forward_hooks
    assert list((tmp_path / "run").iterdir()) == []


def test_a_checkpoint_without_the_head_is_refused(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, tmp_path: Path
) -> None:
    student = tiny_bert()
    BertModel(student.config).save_pretrained(tmp_path / "headless")
    trainer = make_trainer(student, classification_data(), [DistillationCallback(CONFIG, tmp_path / "headless")])
    with pytest.raises(TrainingError, match=r"no weights for classifier.bias, classifier.weight"):
        trainer.train()


def test_a_teacher_that_reads_other_inputs_is_refused(
    make_trainer: Any, tiny_bert: Any, classification_data: Any
) -> None:

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        num_labels=3,
    )
    teacher = ViTForImageClassification(config)
    trainer = make_trainer(tiny_bert(), classification_data(), [DistillationCallback(CONFIG, teacher)])
    with pytest.raises(TrainingError, match="reads 'pixel_values', the student 'input_ids'"):
        trainer.train()


def tokenizer_of(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(("[UNK]", "[PAD]", *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture
def teacher_folder(tiny_bert: Any, tmp_path: Path) -> Iterator[Path]:
    """A saved teacher with a tokenizer that knows "a" and "b"."""
    folder = tmp_path / "teacher"
    tiny_bert(seed=1).save_pretrained(folder)
    tokenizer_of("a", "b").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(("words", "fits"), [(("a", "b"), True), (("b", "a"), False)])
def test_vocabularies_of_the_same_size_are_compared(
    make_trainer: Any,
    tiny_bert: Any,
    classification_data: Any,
    teacher_folder: Path,
    by_name: bool,
    words: Any,
    fits: bool,
) -> None:
    teacher = teacher_folder if by_name else BertForSequenceClassification.from_pretrained(teacher_folder)
    trainer = make_trainer(
        tiny_bert(pad_token_id=1),
        classification_data(),
        [DistillationCallback(CONFIG, teacher)],
        trainer_options={"processing_class": tokenizer_of(*words)},
    )
    if fits:
        trainer.train()
    else:
        with pytest.raises(TrainingError, match=r"other ids than the student's to 2 tokens, such as \['a', 'b'\]"):
            trainer.train()


def test_arguments_of_other_types_are_refused_at_once(tiny_bert: Any) -> None:
    with pytest.raises(ConfigError, match="teacher is a int"):
        DistillationCallback(CONFIG, 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="config is a dict"):
        DistillationCallback({"alpha": 0.5}, tiny_bert())  # type: ignore[arg-type]
