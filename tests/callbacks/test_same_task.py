"""Labels and vocabularies of teacher and student: what is compared, and with what."""

import json
from typing import Any

import pytest
import tiny_models
from zoo import ALL

from hf_compress.callbacks.same_task import Task, check_padding, check_same_task
from hf_compress.errors import ConfigError, TrainingError


def test_labels_that_are_not_there_have_no_names() -> None:
    student = ALL["pvt"]()
    student.config.id2label = None
    check_same_task(Task.of(student.config), student)
    check_same_task(Task(("cat", "dog"), None, None), student)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vilt", "pvt"])
def test_a_stored_config_says_what_the_config_says(name: str) -> None:
    config: Any = ALL[name]().config
    assert Task.stored(json.loads(json.dumps(config.to_dict(), default=str))) == Task.of(config)


def test_parts_of_a_stored_config_say_the_vocabulary() -> None:
    assert Task.stored({"vocab_size": 3, "text_config": {"vocab_size": 5}}).vocab_size == 5
    assert Task.stored({"model_type": "of nobody's"}) == Task(None, None, None)


@pytest.mark.parametrize(
    ("labels", "kind", "size", "message"),
    [
        (("a", "b"), None, None, "the teacher has 2 labels, the student 3"),
        (("a", "b", "c"), None, None, r"the teacher's labels are \['a', 'b', 'c'\], the student's \['x', 'y', 'z'\]"),
        (None, "regression", None, "problem_type is 'regression', the student's 'single_label_classification'"),
        (None, None, 7, r"vocabulary has 7 tokens, the student's 97; .*only padded, .*\(padded_vocabulary=True\)"),
    ],
)
def test_another_task_is_refused(labels: Any, kind: Any, size: Any, message: str) -> None:
    student = tiny_models.bert(id2label={0: "x", 1: "y", 2: "z"}, problem_type="single_label_classification")
    with pytest.raises(TrainingError, match=message):
        check_same_task(Task(labels, kind, size), student)


def test_padding_has_an_effect_where_any_size_differs_or_is_not_known() -> None:
    student = tiny_models.bert()
    check_same_task(Task(None, None, 7), student, padded=True)
    for sizes in ((7,), (97, 104), (None,), (97, None)):
        check_padding(sizes, student)
    for sizes in ((97,), (97, 97)):
        with pytest.raises(ConfigError, match=r"padded_vocabulary: got True; allowed: False, .* have 97 tokens each"):
            check_padding(sizes, student)
