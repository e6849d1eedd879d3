"""Training with the stored answers of a teacher is training with the teacher."""

import pytest
import torch
from tiny_models import bart, randomize
from training_runs import NO_DROPOUT, Recorder, distance, same
from transformers import BertForQuestionAnswering, BertForTokenClassification

from hf_compress import (
    ConfigError,
    DistillationCallback,
    DistillationConfig,
    TeacherCache,
    TrainingError,
    cache_teacher_outputs,
    preview,
)

CONFIG = DistillationConfig(alpha=0.7, temperature=2.0)


def classification(make, data, _):
    return make, data(16)


def tokens(make, data, _):
    def model(seed=0):
        return randomize(BertForTokenClassification(make(seed=seed, **NO_DROPOUT).config), seed)

    return model, [
        {**each, "labels": (each["input_ids"] % 3).masked_fill(each["attention_mask"] == 0, -100)} for each in data(16)
    ]


def spans(make, data, _):
    def model(seed=0):
        return randomize(BertForQuestionAnswering(make(num_labels=2, **NO_DROPOUT).config), seed)

    ends = {"start_positions": 0, "end_positions": 2}
    return model, [{**{k: v for k, v in each.items() if k != "labels"}, **ends} for each in data(16)]


def language(_, __, both):
    make, data = both
    return make, data(16)


TASKS = {"classification": classification, "tokens": tokens, "spans": spans, "causal language": language}


@pytest.fixture
def task(tiny_bert, classification_data, tiny_llama, language_data):
    def get(name):
        make, data = TASKS[name](tiny_bert, classification_data, (tiny_llama, language_data))
        return (lambda seed: make(seed=seed, **NO_DROPOUT) if make is tiny_bert else make(seed=seed)), data

    return get


def gradients(make_trainer, make, data, teacher, config=CONFIG, **options):
    recorder = Recorder()
    trainer = make_trainer(make(0), data, [DistillationCallback(config, teacher), recorder], **options)
    trainer.train()
    return recorder


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulated"])
def test_gradients_are_those_of_the_teacher(task, make_trainer, tmp_path, name, options) -> None:
    make, data = task(name)
    teacher = make(1)
    cache = cache_teacher_outputs(teacher, make_trainer(make(0), data), tmp_path / "cache")
    live = gradients(make_trainer, make, data, teacher, **options)
    for given in (cache, tmp_path / "cache"):
        cached = gradients(make_trainer, make, data, given, **options)
        for mine, theirs in zip(cached.gradients, live.gradients, strict=True):
            assert distance(mine, theirs) < 1e-5


def test_a_seq2seq_teacher_whose_labels_are_smoothed(make_trainer, tmp_path) -> None:
    ids = torch.randint(3, 30, (8, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row.flip(0), "decoder_input_ids": row.flip(0).roll(1)} for row in ids]

    def make(seed):
        return randomize(bart(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0), seed)

    teacher = make(1)
    cache = cache_teacher_outputs(teacher, make_trainer(make(0), data), tmp_path / "cache")
    options = {"label_smoothing_factor": 0.1}
    live, cached = (gradients(make_trainer, make, data, each, **options) for each in (teacher, cache))
    for mine, theirs in zip(cached.gradients, live.gradients, strict=True):
        assert distance(mine, theirs) < 1e-5


def test_the_largest_logits_of_a_language_model(task, make_trainer, tmp_path) -> None:
    """All of them are the teacher; a few are near it."""
    make, data = task("causal language")
    teacher, found = make(1), {}
    for top_k in (49, 20):
        where = tmp_path / str(top_k)
        cache = cache_teacher_outputs(teacher, make_trainer(make(0), data), where, top_k=top_k, temperature=2.0)
        found[top_k] = gradients(make_trainer, make, data, cache).gradients[0]
    live = gradients(make_trainer, make, data, teacher).gradients[0]
    assert distance(found[49], live) < 1e-4
    assert 1e-4 < distance(found[20], live) < 0.5
    for config, message in (
        (DistillationConfig(temperature=3.0), "temperature 2.0, not 3.0"),
        (DistillationConfig(loss="mse"), "only the largest logits"),
        (DistillationConfig(temperature={"start": 1.0, "stop": 2.0}), "got a Ramp"),
        (DistillationConfig(features=[{"loss": "hidden_mse"}]), "nothing of its layers"),
    ):
        trainer = make_trainer(make(0), data, [DistillationCallback(config, TeacherCache.open(tmp_path / "20"))])
        with pytest.raises(ConfigError, match=message):
            trainer.train()


def test_a_stale_cache_is_refused_before_training(task, make_trainer, tmp_path, classification_data) -> None:
    make, data = task("classification")
    cache = cache_teacher_outputs(make(1), make_trainer(make(0), data), tmp_path / "cache")
    student = make(0)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer = make_trainer(student, classification_data(16, seed=5), [DistillationCallback(CONFIG, cache)])
    with pytest.raises(TrainingError, match="not"):
        trainer.train()
    assert same(student.state_dict(), before)
    assert not student._forward_hooks


def test_a_cache_of_another_task_is_refused(task, make_trainer, tmp_path, tiny_bert) -> None:
    make, data = task("classification")
    cache = cache_teacher_outputs(make(1), make_trainer(make(0), data), tmp_path / "cache")
    trainer = make_trainer(tiny_bert(num_labels=4), data, [DistillationCallback(CONFIG, cache)])
    with pytest.raises(TrainingError, match="teacher has 3 labels, the student 4"):
        trainer.train()


def test_it_resumes_and_averages_with_a_live_teacher(task, make_trainer, tmp_path) -> None:
    make, data = task("classification")
    cache = cache_teacher_outputs(make(1), make_trainer(make(0), data), tmp_path / "cache")
    both = [cache, make(2)]
    options = {"save_strategy": "steps", "save_steps": 2}
    straight = gradients(make_trainer, make, data, both, **options)
    recorder = Recorder()
    trainer = make_trainer(make(0), data, [DistillationCallback(CONFIG, both), recorder], **options)
    assert "outputs for 16 examples" in str(preview(trainer))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert same(recorder.weights[-1], straight.weights[-1])
    alone = make_trainer(make(0), data, [DistillationCallback(CONFIG, cache)], **options)
    with pytest.raises(TrainingError, match="another teacher"):
        alone.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_where_the_cache_has_no_answers_are_refused(make_trainer, tmp_path, tiny_llama, side) -> None:
    """The live teacher says something there; without it the loss would be another."""
    ids = torch.randint(5, 40, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask = mask if side == "right" else mask.flip(1)
    labels = ids.clone() if side == "right" else ids.masked_fill(mask == 0, -100)
    data = [
        dict(zip(("input_ids", "attention_mask", "labels"), each, strict=True))
        for each in zip(ids, mask, labels, strict=True)
    ]
    trainer = make_trainer(tiny_llama(), data, max_steps=1)
    cache = cache_teacher_outputs(tiny_llama(seed=1), trainer, tmp_path / "cache")
    with pytest.raises(TrainingError, match=r"labels count at . positions that attention_mask leaves out.*-100"):
        make_trainer(tiny_llama(), data, [DistillationCallback(CONFIG, cache)]).train()
    for each in data:
        each["labels"] = each["labels"].masked_fill(each["attention_mask"].cumsum(0) * each["attention_mask"] < 2, -100)
    make_trainer(tiny_llama(), data, [DistillationCallback(CONFIG, cache)], max_steps=1).train()
