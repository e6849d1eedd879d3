"""Teachers whose vocabulary is padded to another size, against Trainers whose loss was written by hand."""

import dataclasses
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from taught_tasks import ALPHA, TASKS, TEMPERATURE, Pairs, Task, differences
from torch import Tensor, nn
from training_runs import Recorder, distance

from hf_compress import (
    ConfigError,
    DistillationCallback,
    DistillationConfig,
    TrainingError,
    cache_teacher_outputs,
)

RAGGED = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_grad_norm": 0.0,
    "optim": "sgd",
}
"""Two optimizer steps, of three batches and of the two that are left."""

TOKENS = 97
"""What the tokenizer has; labels of a student with more may be beyond."""

CONFIG = DistillationConfig(alpha=ALPHA, temperature=TEMPERATURE, padded_vocabulary=True)


class Averaged(nn.Module):
    """Several teachers as one writes them by hand: the mean of their logits of the tokens that all have."""

    def __init__(self, members: list[Any]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.config = members[0].config

    def forward(self, **inputs: Any) -> Any:
        found = [member(**inputs).logits for member in self.members]
        size = min(each.shape[-1] for each in found)
        return SimpleNamespace(logits=torch.stack([each[..., :size] for each in found]).mean(0))


@dataclass(frozen=True)
class Padded(Task):
    """A task whose models have tables of other sizes; classes are compared where both have them."""

    own: int = TOKENS
    theirs: tuple[int, ...] = field(default=(TOKENS,))

    @classmethod
    def of(cls, name: str, own: int, *theirs: int) -> "Padded":
        task = TASKS[name]

        def pairs(*given: Any) -> Pairs:
            mine, wanted = task.pairs(*given)
            size = min(mine.shape[-1], wanted.shape[-1])
            return mine[:, :size], wanted[:, :size]

        def data() -> list[dict[str, Tensor]]:
            """Every text has a label that is beyond the tokens of the smaller table, if the student has more."""
            made = task.data()
            for each in made if name != "classes" else ():
                last = int((each["labels"] != -100).nonzero()[-1])
                each["labels"] = each["labels"].clone()
                each["labels"][last] = own - 1
            return made

        fields = {each.name: getattr(task, each.name) for each in dataclasses.fields(task)}
        return cls(**{**fields, "pairs": pairs, "data": data}, own=own, theirs=theirs)

    def student(self) -> Any:
        return self.build(**self.changes, vocab_size=self.own).train()

    def teacher(self) -> Any:
        several = [
            dataclasses.replace(self, own=size)._randomized(seed) for seed, size in enumerate(self.theirs, start=1)
        ]
        return several[0] if len(several) == 1 else Averaged(several)

    def _randomized(self, seed: int) -> Any:
        model = self.student()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
        return model


def taught(teacher: Any) -> DistillationCallback:
    return DistillationCallback(CONFIG, list(teacher.members) if isinstance(teacher, Averaged) else teacher)


@pytest.mark.parametrize("smoothing", [0.0, 0.2], ids=["", "smoothed"])
@pytest.mark.parametrize(("own", "theirs"), [(TOKENS, 104), (104, TOKENS)])
@pytest.mark.parametrize("name", ["next tokens", "masked tokens", "t5", "bart"])
def test_the_gradient_is_that_of_common_tokens(
    make_trainer: Any, name: str, own: int, theirs: int, smoothing: float
) -> None:
    options = {"label_smoothing_factor": smoothing, "per_item": True} if smoothing else {}
    assert max(differences(make_trainer, Padded.of(name, own, theirs), taught, **RAGGED, **options)) <= 1e-6


@pytest.mark.parametrize(("own", "theirs"), [(104, (TOKENS, 110)), (TOKENS, (110, TOKENS, 104)), (110, (110, 104))])
def test_several_teachers_are_averaged_over_the_tokens_that_all_have(
    make_trainer: Any, own: int, theirs: tuple[int, ...]
) -> None:
    assert max(differences(make_trainer, Padded.of("next tokens", own, *theirs), taught, **RAGGED)) <= 1e-6


def test_classes_are_no_tokens(make_trainer: Any) -> None:
    """They are all compared, whatever the texts are made of."""
    assert max(differences(make_trainer, Padded.of("classes", TOKENS, 104), taught, **RAGGED)) <= 1e-6


def gradients(make_trainer: Any, task: Task, teacher: Any, config: DistillationConfig = CONFIG) -> list[Any]:
    recorder = Recorder()
    callbacks = [DistillationCallback(config, teacher), recorder]
    make_trainer(task.student(), task.data(), callbacks, max_steps=2).train()
    return recorder.gradients


@pytest.mark.parametrize(("own", "theirs"), [(TOKENS, 104), (104, TOKENS)])
@pytest.mark.parametrize("name", ["next tokens", "t5"])
def test_a_cache_says_what_the_teacher_says(make_trainer: Any, tmp_path: Any, name: str, own: int, theirs: int) -> None:
    """Also where it holds only the largest logits, if these are nearly all; a few are near it."""
    task = Padded.of(name, own, theirs)
    teacher, data = task.teacher(), make_trainer(task.student(), task.data())
    live = gradients(make_trainer, task, teacher)
    for top_k, tolerance in ((None, 1e-5), (theirs - 1, 1e-3), (40, 0.5)):
        options = {} if top_k is None else {"top_k": top_k, "temperature": TEMPERATURE}
        cache = cache_teacher_outputs(teacher, data, tmp_path / str(top_k), **options)
        cached = gradients(make_trainer, task, cache)
        assert all(distance(*each) < tolerance for each in zip(cached, live, strict=True)), top_k


def test_a_decoder_reads_what_its_labels_say(make_trainer: Any, tmp_path: Any) -> None:
    """Data without decoder_input_ids; a label that the teacher lacks is not read where it is the last position."""
    task = Padded.of("t5", 104, TOKENS)
    full = [each for each in task.data() if (each["labels"] != -100).all()]
    bare = [{name: each[name] for name in each if name != "decoder_input_ids"} for each in full]
    task, without = (dataclasses.replace(task, data=lambda rows=rows: rows) for rows in (full, bare))
    assert len(full) > 1
    teacher = task.teacher()
    cache = cache_teacher_outputs(teacher, make_trainer(task.student(), bare), tmp_path / "cache")
    given, live, cached = (
        gradients(make_trainer, *each) for each in ((task, teacher), (without, teacher), (without, cache))
    )
    assert all(distance(*each) < 1e-5 for each in zip(live, given, strict=True))
    assert all(distance(*each) < 1e-5 for each in zip(cached, live, strict=True))


def test_layers_alone_may_be_compared(make_trainer: Any) -> None:
    task = Padded.of("next tokens", TOKENS, 104)
    settings = {"loss": None, "features": [{"loss": "hidden_mse"}]}
    with pytest.raises(TrainingError, match="vocabulary has 104 tokens, the student's 97"):
        gradients(make_trainer, task, task.teacher(), DistillationConfig(**settings))
    found = gradients(make_trainer, task, task.teacher(), DistillationConfig(**settings, padded_vocabulary=True))
    assert len(found) == 2


def test_where_sizes_are_equal_it_is_refused(make_trainer: Any, tmp_path: Any) -> None:
    task = Padded.of("next tokens", TOKENS, TOKENS)
    cache = cache_teacher_outputs(task.teacher(), make_trainer(task.student(), task.data()), tmp_path / "cache")
    for teacher in (task.teacher(), cache, "self", [cache, "self"]):
        with pytest.raises(ConfigError, match=r"padded_vocabulary: got True; allowed: False, .* have 97 tokens each"):
            gradients(make_trainer, task, teacher)


def test_where_sizes_differ_it_is_named(make_trainer: Any, tmp_path: Any) -> None:
    task = Padded.of("next tokens", TOKENS, 104)
    cache = cache_teacher_outputs(task.teacher(), make_trainer(task.student(), task.data()), tmp_path / "cache")
    for teacher in (task.teacher(), cache, [cache, "self"]):
        with pytest.raises(TrainingError, match=r"104 tokens, the student's 97; .*\(padded_vocabulary=True\)"):
            gradients(make_trainer, task, teacher, DistillationConfig())


def test_a_text_with_a_token_that_the_teacher_lacks_is_refused(make_trainer: Any) -> None:
    task = Padded.of("next tokens", 104, TOKENS)
    data = task.data()
    data[0]["input_ids"][0] = 100
    with pytest.raises(TrainingError, match="has a vocabulary of 97 tokens, but input_ids of this batch contain 100"):
        gradients(make_trainer, dataclasses.replace(task, data=lambda: data), task.teacher())


def test_classes_that_the_teacher_lacks_are_not_left_out(make_trainer: Any) -> None:
    task = Padded.of("classes", TOKENS, 104)
    teacher = dataclasses.replace(task, changes={**task.changes, "num_labels": 4}).teacher()
    teacher.config.id2label = None  # so that names of labels are not compared
    for teachers in (teacher, [task.teacher(), teacher]):
        with pytest.raises(TrainingError, match=r"logits have shape .*they must be equal"):
            gradients(make_trainer, task, teachers)
