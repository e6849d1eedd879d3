"""The student as its own teacher: a copy made when the Trainer was, or itself without masks."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from resumable import StopAt, assert_same, distillation, pruning, quantization, results_of, trainer_of
from training_runs import instrumented
from transformers import Trainer, TrainerCallback

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    TrainingError,
    last_complete_checkpoint,
    preview,
)
from hf_compress.callbacks.heads import head_of
from hf_compress.callbacks.teachers import UnmaskedStudent

SHORT = {"max_steps": 4, "save_strategy": "no"}
ORDERS = [" ".join(names) for names in itertools.permutations(("pruning", "distillation", "quantization"))]


def callbacks(order: str, teacher: Any) -> list[TrainerCallback]:
    made = {
        "pruning": lambda: pruning(begin=1, end=3, update_every=1),
        "distillation": lambda: distillation(teacher),
        "quantization": lambda: quantization(begin=1),
    }
    return [made[name]() for name in order.split()]


def trained(folder: Path, made: list[TrainerCallback], **args: Any) -> Trainer:
    trainer = trainer_of(made, folder, **{**SHORT, **args})
    trainer.train()
    return trainer


@pytest.mark.parametrize("order", ORDERS)
def test_self_is_a_copy_of_the_model_that_the_trainer_was_given(tmp_path: Path, order: str) -> None:
    by_name = trained(tmp_path, callbacks(order, "self"))
    as_copy = trained(tmp_path, callbacks(order, copy.deepcopy(tiny_models.bert())))
    assert_same(results_of(by_name), results_of(as_copy))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_self_is_copied_in_the_dtype_that_is_asked_for(tmp_path: Path, dtype: str) -> None:
    copied = copy.deepcopy(tiny_models.bert()).to(getattr(torch, dtype))
    by_name = trained(tmp_path, [distillation("self", teacher_dtype=dtype)])
    assert_same(results_of(by_name), results_of(trained(tmp_path, [distillation(copied)])))
    assert next(by_name.model.parameters()).dtype == torch.float32


def test_self_of_a_run_that_is_resumed_is_that_of_the_straight_run(tmp_path: Path) -> None:
    """Law 5: the weights come from a checkpoint once training begins, the teacher from before."""
    everything = "pruning distillation quantization"
    args = {"save_strategy": "steps", "max_steps": 5}
    straight = trained(tmp_path / "straight", callbacks(everything, "self"), **args)
    trained(tmp_path / "cut", [*callbacks(everything, "self"), StopAt(3)], **args)
    assert not (tmp_path / "cut" / "checkpoint-4").exists()
    resumed = trainer_of(callbacks(everything, "self"), tmp_path / "cut", **{**SHORT, **args})
    resumed.train(resume_from_checkpoint=True)
    assert_same(results_of(resumed), results_of(straight))


def test_self_is_another_where_the_trainer_is_given_the_checkpoint_as_its_model(tmp_path: Path) -> None:
    trained(tmp_path, [distillation("self"), StopAt(2)], save_strategy="steps")
    folder = last_complete_checkpoint(tmp_path)
    later = type(tiny_models.bert()).from_pretrained(folder)
    trainer = trainer_of([distillation("self")], tmp_path, model=later, **SHORT)
    with pytest.raises(TrainingError, match="the checkpoint's run had another teacher"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_self_of_a_callback_that_came_later_is_the_model_at_the_begin_and_cannot_resume(tmp_path: Path) -> None:
    trainer = trainer_of([StopAt(2)], tmp_path, **{**SHORT, "save_strategy": "steps"})
    trainer.add_callback(distillation("self"))
    trainer.train()
    as_copy = trained(tmp_path / "copy", [StopAt(2), distillation(copy.deepcopy(tiny_models.bert()))])
    assert_same(results_of(trainer), results_of(as_copy))
    later = trainer_of([], tmp_path, **SHORT)
    later.add_callback(distillation("self"))
    with pytest.raises(TrainingError, match=r"this callback was added later, and training resumes. Pass it in Trainer"):
        later.train(resume_from_checkpoint=True)


def test_the_trainer_is_known_from_the_moment_it_is_made(tmp_path: Path) -> None:
    callback = distillation("self")
    trainer = trainer_of([callback], tmp_path, **SHORT)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)  # by somebody else than the Trainer
    assert callback._run.trainer is trainer


def test_self_of_a_model_that_is_compressed_already_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of([pruning(begin=1, end=3)], tmp_path, **SHORT)
    trainer.add_callback(distillation("self"))
    with pytest.raises(TrainingError, match="something is attached to it already"):
        trainer.train()


@pytest.mark.parametrize("teacher", ["self", "unmasked"])
def test_a_teacher_that_is_the_student_is_in_no_checkpoint(tmp_path: Path, teacher: str) -> None:
    plain = trained(tmp_path / "plain", [], save_strategy="steps")
    taught = trained(tmp_path / "taught", [distillation(teacher)], save_strategy="steps")
    assert taught.model.state_dict().keys() == plain.model.state_dict().keys()
    names = [{path.name for path in (tmp_path / kind / "checkpoint-4").iterdir()} for kind in ("plain", "taught")]
    assert names[1] - names[0] == {"hf_compress_state.safetensors", "hf_compress_state.json"}
    sizes = [(tmp_path / kind / "checkpoint-4" / "model.safetensors").stat().st_size for kind in ("plain", "taught")]
    assert sizes[0] == sizes[1]


class WatchTeacher(TrainerCallback):
    """Asks the teacher at every step, and a plain model with the same weights."""

    def __init__(self, callback: DistillationCallback) -> None:
        self.callback = callback
        self.answers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        mixer: Any = self.callback._mixer
        inputs = {"input_ids": torch.arange(5, 25).view(2, 10)}
        before = instrumented(model)
        theirs = mixer.teacher.teach(inputs, head_of(model)).logits
        assert instrumented(model) == before
        assert model.training
        assert all(module.training for module in model.modules())
        plain = tiny_models.bert()
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            wanted, masked = plain(**inputs).logits, copy.deepcopy(model).eval()(**inputs).logits
        self.answers.append((theirs, wanted, masked))


@pytest.mark.parametrize("order", ORDERS)
def test_unmasked_is_the_model_of_the_step_without_masks_fake_quantization_and_dropout(
    tmp_path: Path, order: str
) -> None:
    made = callbacks(order, "unmasked")
    watch = WatchTeacher(next(each for each in made if isinstance(each, DistillationCallback)))
    trainer = trained(tmp_path, [*made, watch])
    assert len(watch.answers) == 4
    for theirs, wanted, _ in watch.answers:
        assert torch.equal(theirs, wanted)
    theirs, _, masked = watch.answers[-1]
    assert not torch.allclose(theirs, masked, atol=1e-3)
    assert any(not bool(mask.all()) for name, mask in results_of(trainer).items() if name.startswith("mask"))


def test_unmasked_resumes_as_a_straight_run(tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "max_steps": 5}
    straight = trained(tmp_path / "straight", callbacks(ORDERS[0], "unmasked"), **args)
    trained(tmp_path / "cut", [*callbacks(ORDERS[0], "unmasked"), StopAt(3)], **args)
    resumed = trainer_of(callbacks(ORDERS[0], "unmasked"), tmp_path / "cut", **{**SHORT, **args})
    resumed.train(resume_from_checkpoint=True)
    assert_same(results_of(resumed), results_of(straight))


def test_masks_are_back_after_the_unmasked_student_has_failed(tmp_path: Path) -> None:
    seen: list[tuple[list[str], bool]] = []
    run, failing = UnmaskedStudent._run, iter([False] * 5 + [True])

    class Fails(UnmaskedStudent):
        def _run(self, inputs: Any) -> Any:
            if not self.model.training:  # the first batch is compared before anything is attached
                return run(self, inputs)
            before = instrumented(self.model)
            handle = None
            if next(failing):
                handle = self.model.classifier.register_forward_pre_hook(fail)
            try:
                return run(self, inputs)
            finally:
                if handle is not None:
                    handle.remove()
                seen.append((before, instrumented(self.model) == before and self.model.training))

    def fail(module: Any, args: Any) -> None:
        raise FloatingPointError

    trainer = trainer_of([pruning(begin=1, end=3, update_every=1), distillation("unmasked")], tmp_path, **SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_compress.callbacks.distillation.UnmaskedStudent", Fails)
        with pytest.raises(FloatingPointError):
            trainer.train()
    assert len(seen) == 6
    assert all(before and same for before, same in seen)
    assert instrumented(trainer.model) == []  # the run is over, and everything is taken off


@pytest.mark.parametrize("criterion", ["taylor", "wanda", "apoz", "mean_activation", "movement", "l0"])
def test_the_unmasked_pass_is_not_among_those_that_units_are_judged_by(tmp_path: Path, criterion: str) -> None:
    """While no weight changes, the copy says the same, and nothing that is measured of the student may differ."""
    found = []
    for teacher in ("self", "unmasked"):
        made = [pruning(criterion, begin=1, end=3, update_every=1), distillation(teacher)]
        found.append(results_of(trained(tmp_path, made, learning_rate=0.0, lr_scheduler_type="constant")))
    assert_same(*found)
    assert any(not bool(mask.all()) for name, mask in found[0].items() if name.startswith("mask"))


@pytest.mark.parametrize("teacher", ["self", "unmasked"])
@pytest.mark.parametrize(
    "args",
    [
        pytest.param({"activation_checkpointing": True}, id="checkpointing"),
        pytest.param(
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            id="reentrant",
        ),
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager"}, id="compiled", marks=pytest.mark.slow
        ),
    ],
)
def test_the_student_teaches_alike_whatever_the_trainer_does(
    tmp_path: Path, teacher: str, args: dict[str, Any]
) -> None:
    plain, other = (trained(tmp_path, callbacks(ORDERS[0], teacher), **given) for given in ({}, args))
    for name, weight in results_of(plain).items():
        torch.testing.assert_close(results_of(other)[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:PruningCallback. units were removed from the base weights")
@pytest.mark.parametrize("teacher", ["self", "unmasked"])
def test_a_student_with_adapters_teaches_itself(tmp_path: Path, teacher: str) -> None:
    def adapted() -> Any:
        torch.manual_seed(0)
        options = {"r": 2, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
        return get_peft_model(tiny_models.bert(), LoraConfig(**options))

    frozen = {"learning_rate": 0.0, "lr_scheduler_type": "constant", "logging_strategy": "steps", "logging_steps": 1}
    made = [pruning(begin=1, end=3, update_every=1), distillation(teacher)]
    ours = trained(tmp_path, made, model=adapted(), **frozen)
    made = [pruning(begin=1, end=3, update_every=1), distillation(adapted())]
    by_hand = trained(tmp_path, made, model=adapted(), **frozen)
    losses = [
        [entry["distillation_loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (ours, by_hand)
    ]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_unmasked_draws_no_random_numbers(tmp_path: Path) -> None:
    """The student of a plain run sees the same dropout."""
    states = []
    for made in ([], [DistillationCallback(DistillationConfig(alpha=1e-6), "unmasked")]):
        trained(tmp_path, made)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("teacher", "text"), [("self", "BertForSequenceClassification, 20,155 parameters"), ("unmasked", "the student")]
)
def test_preview_says_who_teaches(tmp_path: Path, teacher: str, text: str) -> None:
    told = preview(trainer_of(callbacks(ORDERS[0], teacher), tmp_path, **SHORT))
    assert str(told.sections["distillation"]["teacher"]).startswith(text)
    assert told.sections["distillation"]["logits loss of the first batch"] == pytest.approx(0, abs=1e-6)
