"""Caches that say of their teacher what nobody would have written, or what only its author's code understands."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_compress import ConfigError, DistillationCallback, DistillationConfig, TrainingError, cache_teacher_outputs
from hf_compress.teachers.manifest import MANIFEST, read_manifest


@pytest.fixture
def train(tmp_path: Path, tiny_bert: Any, classification_data: Any, make_trainer: Any) -> Callable[..., Any]:
    """``train(**changes)`` trains with a cache whose teacher has a changed config."""

    def run(**changes: Any) -> None:
        folder, data = tmp_path / "cache", classification_data(4)
        cache_teacher_outputs(tiny_bert(seed=1), make_trainer(tiny_bert(), data), folder)
        made = read_manifest(folder)
        config = {**made.teacher["config"], **changes}
        replace(made, teacher={**made.teacher, "config": config}).write(folder, MANIFEST)
        make_trainer(tiny_bert(), data, [DistillationCallback(DistillationConfig(), folder)], max_steps=1).train()

    return run


def test_a_teacher_of_unknown_type_teaches(train: Callable[..., Any]) -> None:
    train(model_type="of nobody's")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "of nobody's", "vocab_size": 7}, "the teacher's vocabulary has 7 tokens, the student's 50"),
        ({"vocab_size": "7"}, "cache: damaged: the stored config .*: vocab_size is '7'; allowed: an int"),
        ({"id2label": "x"}, "damaged: .* id2label is 'x'; allowed: an object"),
        ({"id2label": {"a": "x"}}, r"damaged: .* id2label is \{'a': 'x'\}"),
        ({"problem_type": 3}, "damaged: .* problem_type is 3; allowed: a text"),
        ({"id2label": {"0": "LABEL_0"}}, "the teacher has 1 labels, the student 3"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    train: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        train(**changes)


@pytest.mark.parametrize("settings", [{"teacher_dtype": "bfloat16"}, {"teacher_device": "cpu"}])
def test_settings_without_effect_on_a_cache_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    config = DistillationConfig(**settings)
    for given in (tmp_path, str(tmp_path), [tmp_path, "unmasked"]):
        with pytest.raises(ConfigError, match=rf"DistillationConfig\.{next(iter(settings))}: got .* cache"):
            DistillationCallback(config, given)
    DistillationCallback(config, [tmp_path, "self"])
