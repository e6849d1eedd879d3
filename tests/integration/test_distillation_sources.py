"""Several teachers, adapters as teachers, and where and in what they compute."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from resumable import assert_same, distillation, results_of, trainer_of
from torch import nn
from transformers import AutoModelForSequenceClassification, BertModel, Trainer, TrainerCallback
from zoo import randomize

from hf_compress import ConfigError, DistillationCallback, DistillationConfig, TrainingError
from hf_compress.callbacks.teacher import load_teacher

SHORT = {"max_steps": 2, "save_strategy": "no"}


def bert(seed: int, **sizes: Any) -> Any:
    return randomize(tiny_models.bert(**sizes), seed)


def trained(folder: Path, made: list[TrainerCallback], **args: Any) -> Trainer:
    trainer = trainer_of(made, folder, **{**SHORT, **args})
    trainer.train()
    return trainer


class Mean(nn.Module):
    """Logits of several models, averaged."""

    def __init__(self, *members: Any) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, **inputs: Any) -> torch.Tensor:
        return torch.stack([member(**inputs).logits for member in self.members]).mean(0)


class AveragesByHand(Trainer):
    teacher: Any

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            p = F.softmax(self.teacher(**inputs) / 2, dim=-1)
        q = F.log_softmax(outputs.logits / 2, dim=-1)
        return 0.5 * outputs.loss + 0.5 * 4 * F.kl_div(q, p, reduction="batchmean")


def test_the_logits_of_several_teachers_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [bert(1), bert(2, hidden_size=16), bert(3)]
    ours = trained(tmp_path, [DistillationCallback(DistillationConfig(alpha=0.5, temperature=2), members)])
    monkeypatch.setattr("resumable.Trainer", AveragesByHand)
    by_hand: Any = trainer_of([], tmp_path, **SHORT)
    by_hand.teacher = Mean(*members).eval()
    by_hand.train()
    start = tiny_models.bert().state_dict()
    for name, weight in ours.model.state_dict().items():
        torch.testing.assert_close(weight, by_hand.model.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(start[name], weight) for name, weight in ours.model.state_dict().items())


def test_one_teacher_in_a_list_is_one_teacher(tmp_path: Path) -> None:
    alone, listed = (trained(tmp_path, [distillation(given)]) for given in (bert(1), [bert(1)]))
    assert_same(results_of(alone), results_of(listed))


def test_models_names_and_the_student_teach_together(tmp_path: Path) -> None:
    bert(1).save_pretrained(tmp_path / "saved")
    everyone = trained(tmp_path, [distillation([tmp_path / "saved", bert(2), "self", "unmasked"])])
    same = trained(tmp_path, [distillation([bert(1), bert(2), copy.deepcopy(tiny_models.bert()), "unmasked"])])
    assert_same(results_of(everyone), results_of(same))


def test_every_member_is_given_back_and_compared_when_training_resumes(tmp_path: Path) -> None:
    members = [bert(1), bert(2)]
    members[1].bert.requires_grad_(False)
    flags = [[parameter.requires_grad for parameter in member.parameters()] for member in members]
    trained(tmp_path, [distillation(members)], save_strategy="steps")
    assert flags == [[parameter.requires_grad for parameter in member.parameters()] for member in members]
    for others, fits in ((members[::-1], True), ([bert(1), bert(3)], False), (bert(1), False)):
        trainer = trainer_of([distillation(others)], tmp_path, max_steps=3, save_strategy="no")
        if fits:
            trainer.train(resume_from_checkpoint=True)
        else:
            with pytest.raises(TrainingError, match="another teacher"):
                trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (lambda: [bert(1), bert(2, num_labels=4)], "teacher has 4 labels, the student 3"),
        (lambda: [bert(1), "no/such/folder"], "'no/such/folder' cannot be loaded"),
    ],
)
def test_every_member_is_checked(tmp_path: Path, members: Callable[[], Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        trained(tmp_path, [distillation(members())])


def lora(model: Any, **changes: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, **changes))


HEAD = {"task_type": "SEQ_CLS"}  # PEFT then trains the head, and saves it with the adapter


def saved(folder: Path, base: Any, num_labels: int = 3, **changes: Any) -> tuple[Path, Any]:
    """Save a base model, and an adapter for it in another folder; return that and the adapted model."""
    base.save_pretrained(folder / "base")
    loaded = AutoModelForSequenceClassification.from_pretrained(
        folder / "base", num_labels=num_labels, ignore_mismatched_sizes=True
    )
    adapted = lora(loaded, **changes).eval()
    adapted.save_pretrained(folder / "adapter")
    return folder / "adapter", adapted


ADAPTERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "of a model with a head": (lambda: bert(1), {}),
    "with a head of its own": (lambda: bert(1), HEAD),
    "with a head of its own, over none": (lambda: BertModel(bert(1).config), HEAD),
    "with a head of its own, over another": (lambda: bert(1, num_labels=7), HEAD),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_teaches_by_the_name_of_its_folder(tmp_path: Path, case: str) -> None:
    base, changes = ADAPTERS[case]
    folder, adapted = saved(tmp_path, base(), **changes)
    inputs = {"input_ids": torch.arange(5, 25).view(2, 10)}
    with torch.no_grad():
        loaded = load_teacher(str(folder), tiny_models.bert()).eval()
        assert torch.equal(loaded(**inputs).logits, adapted(**inputs).logits)
        assert {p.dtype for p in load_teacher(str(folder), tiny_models.bert(), "bfloat16").parameters()} == {
            torch.bfloat16
        }
    by_name, as_model = (trained(tmp_path, [distillation(given)]) for given in (folder, adapted))
    assert_same(results_of(by_name), results_of(as_model))


def test_an_adapter_whose_head_would_be_random_is_refused(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, BertModel(bert(1).config))
    with pytest.raises(TrainingError, match=r"no weights for classifier\.bias, classifier\.weight"):
        trained(tmp_path, [distillation(folder)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [(HEAD, "cannot be loaded as BertFor.* that it has the student's labels"), ({}, "teacher has 2 labels")],
)
def test_an_adapter_for_other_labels_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder, _ = saved(tmp_path, bert(1, num_labels=2), num_labels=2, **changes)
    with pytest.raises(TrainingError, match=message):
        trained(tmp_path, [distillation(folder)])


def test_a_teacher_by_name_is_loaded_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    bert(1).save_pretrained(tmp_path / "saved")
    callbacks = [distillation(tmp_path / "saved", teacher_dtype="bfloat16"), distillation(bert(1).to(torch.bfloat16))]
    by_name, as_model = (trained(tmp_path, [callback]) for callback in callbacks)
    assert_same(results_of(by_name), results_of(as_model))


def test_a_teacher_computes_on_the_device_that_is_asked_for(tmp_path: Path) -> None:
    plain, placed = (trained(tmp_path, [distillation(bert(1), **given)]) for given in ({}, {"teacher_device": "cpu"}))
    assert_same(results_of(plain), results_of(placed))


@pytest.mark.skipif(torch.cuda.is_available(), reason="that device is there")
def test_a_device_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"cannot be moved to teacher_device='cuda:1'.*Give a device that is there"):
        trained(tmp_path, [distillation(bert(1), teacher_device="cuda:1")])


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        (lambda: bert(1), {"teacher_dtype": "bfloat16"}, r"teacher_dtype: got 'bfloat16', but .* is there already"),
        (lambda: "unmasked", {"teacher_dtype": "bfloat16"}, "teacher_dtype: got"),
        (lambda: [bert(1), "unmasked"], {"teacher_dtype": "bfloat16"}, "teacher_dtype: got"),
        (lambda: "unmasked", {"teacher_device": "cpu"}, "teacher_device: got 'cpu'; allowed: None where the"),
        (list, {}, "teacher is an empty list; pass at least one teacher"),
        (lambda: [bert(1), 3], {}, "teacher is a int; allowed: a PreTrainedModel, .*'self', 'unmasked', or a list"),
        (lambda: None, {}, "teacher is a NoneType"),
        (lambda: "", {}, "teacher is an empty text; allowed: the Hub name or folder"),
        (lambda: ["self", ""], {}, "teacher is an empty text"),
    ],
)
def test_settings_without_effect_are_refused_at_once(
    teacher: Callable[[], Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillationCallback(DistillationConfig(**settings), teacher())


@pytest.mark.parametrize("mark", [{"hf_device_map": {"": 0}}, {"is_quantized": True}])
def test_a_device_for_a_teacher_that_cannot_be_moved_is_refused(tmp_path: Path, mark: dict[str, Any]) -> None:
    teacher = bert(1)
    vars(teacher).update(mark)
    with pytest.raises(ConfigError, match="teacher_device: got 'cpu', but the teacher is quantized or loaded with"):
        trained(tmp_path, [distillation(teacher, teacher_device="cpu")])
