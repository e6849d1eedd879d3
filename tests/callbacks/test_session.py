"""Runs that do not end as they should: whatever happens, nothing of a run acts on the next one."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from training_runs import METHODS, Recorder, compression, instrumented, same
from transformers import Trainer, TrainerCallback

from hf_compress import (
    PruningCallback,
    PruningConfig,
    QuantizationConfig,
    TargetError,
    TrainingError,
    calibrate,
    shrink,
)
from hf_compress.instruments.finished import modules_with_final_gates

WEIGHTS = QuantizationConfig(scheme="int8_weight_only", method="ptq")


class PowerCutError(BaseException):
    """Like KeyboardInterrupt, which would end pytest if it came through."""


class Does(TrainerCallback):
    """Does something at an event of one step."""

    def __init__(self, event: str, action: Callable[[], Any], step: int = 0) -> None:
        def act(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= step:
                action()

        setattr(self, event, act)


def fail() -> None:
    raise PowerCutError


class FailsToEvaluate(Trainer):
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        fail()


ENDINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "in a step": (lambda: [Does("on_step_end", fail, 3)], {}),
    "in an evaluation": (list, {"trainer_class": FailsToEvaluate, "eval_strategy": "steps", "eval_steps": 2}),
    "in the first evaluation": (list, {"trainer_class": FailsToEvaluate, "eval_on_start": True}),
    "between two epochs": (lambda: [Does("on_epoch_begin", fail, 2)], {}),
    "at the end": (lambda: [Does("on_train_end", fail)], {}),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_exception_takes_everything_off_at_once(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, ending: str
) -> None:
    make, args = ENDINGS[ending]
    teacher = tiny_bert(seed=1)
    teacher.bert.eval()
    modes, flags = [m.training for m in teacher.modules()], [p.requires_grad for p in teacher.parameters()]
    callbacks = [*make(), *compression(METHODS["all"], teacher)]
    trainer = make_trainer(tiny_bert(), classification_data(), callbacks, label_smoothing_factor=0.1, **args)
    before, smoother, handler = set(vars(trainer)), trainer.label_smoother, set(vars(trainer.callback_handler))
    with pytest.raises(PowerCutError):
        trainer.train()
    assert instrumented(trainer.model) == []
    assert not trainer.model._forward_hooks and not trainer.model._forward_pre_hooks
    assert [m.training for m in teacher.modules()] == modes
    assert [p.requires_grad for p in teacher.parameters()] == flags
    assert {name for name in set(vars(trainer)) - before if callable(getattr(trainer, name))} == set()
    assert trainer.label_smoother is smoother
    assert set(vars(trainer.callback_handler)) == handler
    assert "save_to_json" not in vars(trainer.state)


def test_the_next_trainer_trains_as_if_nothing_had_been(
    make_trainer: Any, tiny_bert: Any, classification_data: Any
) -> None:
    """Under the gates of the run before, or taught twice, it would come to other weights."""
    finals = []
    for interrupted in (False, True):
        model = tiny_bert()
        before, teacher = copy.deepcopy(model.state_dict()), tiny_bert(seed=1)
        if interrupted:
            callbacks = [*compression(METHODS["all"], teacher), Does("on_step_end", fail, 3)]
            with pytest.raises(PowerCutError):
                make_trainer(model, classification_data(), callbacks).train()
            model.load_state_dict(before)
        make_trainer(model, classification_data(), compression(METHODS["all"], teacher)).train()
        finals.append(model.state_dict())
    assert same(*finals)


class GoesOn(Trainer):
    """Does without an evaluation that fails."""

    caught = 0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except ValueError:
            self.caught += 1

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError


def test_an_exception_that_does_not_end_training_takes_nothing_off(
    make_trainer: Any, tiny_bert: Any, classification_data: Any
) -> None:
    callbacks, data = compression(METHODS["all"], tiny_bert(seed=1)), classification_data()
    trainer = make_trainer(tiny_bert(), data, callbacks, trainer_class=GoesOn, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert trainer.caught > 0
    assert shrink(trainer).num_parameters() < trainer.model.num_parameters()


@pytest.mark.parametrize(
    ("method", "args", "last_step"),
    [("pruning", {}, 2), ("pruning", {"save_strategy": "steps", "save_steps": 1}, 1), ("all", {}, 1)],
    ids=["alone: at the end of the epoch", "alone: at the next checkpoint", "beside others: at the next step"],
)
def test_a_callback_that_is_removed_while_training_is_an_error(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, method: str, args: dict[str, Any], last_step: int
) -> None:
    remove = Does("on_step_end", lambda: trainer.remove_callback(PruningCallback), 1)
    callbacks = [*compression(METHODS[method], tiny_bert(seed=1)), remove]
    trainer = make_trainer(tiny_bert(), classification_data(), callbacks, **args)
    with pytest.raises(TrainingError, match="PruningCallback was removed while training was under way"):
        trainer.train()
    assert trainer.state.global_step == last_step
    assert instrumented(trainer.model) == []
    assert not trainer.model._forward_hooks


@pytest.mark.parametrize("added", ["on_step_begin", "on_step_end"])
def test_a_callback_added_while_training_is_an_error_at_the_next_step(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, added: str
) -> None:
    (late,) = compression(["pruning"])
    add = Does(added, lambda: trainer.add_callback(late), 1)
    trainer = make_trainer(tiny_bert(), classification_data(), [add], max_steps=40)
    with pytest.raises(TrainingError, match="PruningCallback was added after training had begun"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.fixture
def unfinished(make_trainer: Any, tiny_bert: Any, classification_data: Any) -> tuple[Any, Any]:
    """A Trainer whose run failed where no callback could see it, and its teacher."""
    teacher = tiny_bert(seed=1)
    callbacks = [*compression(METHODS["all"], teacher), Does("on_train_begin", fail)]
    trainer = make_trainer(tiny_bert(), classification_data(), callbacks)
    with pytest.raises(PowerCutError):
        trainer.train()
    trainer.remove_callback(Does)
    return trainer, teacher


def test_a_run_that_never_ended_is_taken_off_before_the_next(
    unfinished: Any, make_trainer: Any, tiny_bert: Any, classification_data: Any
) -> None:
    earlier, teacher = unfinished
    assert instrumented(earlier.model) and not any(p.requires_grad for p in teacher.parameters())
    trainer = make_trainer(earlier.model, classification_data(), compression(METHODS["all"], teacher))
    with pytest.warns(UserWarning, match=r"another Trainer with this BertFor.* \(PruningCallback, Distillation"):
        trainer.train()
    assert all(p.requires_grad for p in teacher.parameters())
    plain = make_trainer(tiny_bert(), classification_data(), compression(METHODS["all"], teacher))
    plain.train()
    assert same(trainer.model.state_dict(), plain.model.state_dict())


def test_a_teacher_of_a_run_that_never_ended_is_given_back(
    unfinished: Any, make_trainer: Any, tiny_bert: Any, classification_data: Any
) -> None:
    _, teacher = unfinished
    trainer = make_trainer(tiny_bert(seed=2), classification_data(), compression(["distillation"], teacher))
    with pytest.warns(UserWarning, match="never ended"):
        trainer.train()
    assert all(p.requires_grad for p in teacher.parameters())


def test_the_same_trainer_may_try_again(unfinished: Any) -> None:
    trainer, teacher = unfinished
    trainer.remove_callback(PruningCallback)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    assert not any("gate" in str(vars(each)) for each in trainer.callback_handler.callbacks)
    assert all(p.requires_grad for p in teacher.parameters())


def test_fake_quantizers_of_a_finished_run_do_not_act_on_another(
    make_trainer: Any, tiny_bert: Any, classification_data: Any
) -> None:
    first = make_trainer(tiny_bert(), classification_data(), compression(["quantization"]))
    first.train()
    dense = copy.deepcopy(first.model)
    trainer = make_trainer(first.model, classification_data(), compression(["pruning"]))
    with pytest.warns(UserWarning, match=r"13 modules .* carried fake quantizers.*They were taken off"):
        trainer.train()
    plain = tiny_bert()
    plain.load_state_dict(dense.state_dict())
    make_trainer(plain, classification_data(), compression(["pruning"])).train()
    assert same(trainer.model.state_dict(), plain.state_dict())


def test_gates_of_a_finished_run_are_not_taken_off(make_trainer: Any, tiny_bert: Any, classification_data: Any) -> None:
    """Without them, what was pruned would be back."""
    config = PruningConfig(structures={"hidden": 0.25}, begin=1, end=3, update_every=1)
    first = make_trainer(tiny_bert(), classification_data(), [PruningCallback(config)])
    with pytest.warns(UserWarning, match="gates stay"):
        first.train()
    gated = instrumented(first.model)
    for model in (first.model, copy.deepcopy(first.model)):
        again = make_trainer(model, classification_data(), compression(["pruning"]))
        with pytest.raises(TrainingError, match=r"gates of a finished pruning run.*Call shrink\(trainer\)"):
            again.train()
        assert instrumented(model) == gated
    small = shrink(first)
    recorder = Recorder()
    make_trainer(small, classification_data(), [*compression(["distillation"], tiny_bert(seed=1)), recorder]).train()
    assert len(recorder.weights) == 4
    assert torch.isfinite(recorder.weights[-1]["classifier.weight"]).all()


def masks_made(trainer: Any) -> bool:
    (pruning,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, PruningCallback))
    return pruning.masked_model is trainer.model


@pytest.mark.parametrize(
    ("names", "position", "left", "pruned"),
    [
        (("quantization", "pruning"), 1, 0, False),
        (("pruning", "quantization"), 1, 0, True),
        (("pruning", "quantization"), 2, 13, True),
    ],
    ids=["before pruning ends", "before quantization ends", "after all have ended"],
)
def test_an_exception_of_another_callback_while_training_ends(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, names: Any, position: int, left: int, pruned: bool
) -> None:
    """Fake quantizers stay where all compression has finished, and pruning that has finished is in the weights."""
    callbacks: list[Any] = compression(names)
    callbacks.insert(position, Does("on_train_end", fail))
    trainer = make_trainer(tiny_bert(), classification_data(), callbacks)
    with pytest.raises(PowerCutError):
        trainer.train()
    assert len(instrumented(trainer.model)) == left
    assert masks_made(trainer) == pruned
    if pruned:
        assert shrink(trainer).num_parameters() < trainer.model.num_parameters()
    if left:
        with pytest.raises(TargetError, match=r"has a fake quantizer already.*Call detach\(\) first"):
            calibrate(trainer.model, None, WEIGHTS)
        callbacks[1].detach()
        assert calibrate(trainer.model, None, WEIGHTS).layers
    trainer.remove_callback(Does)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantizers that were calibrated go
        trainer.train()
    assert len(instrumented(trainer.model)) == 13 and masks_made(trainer)


def test_pruning_that_misses_its_target_leaves_no_quantizers(
    make_trainer: Any, tiny_bert: Any, classification_data: Any
) -> None:
    def stop(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True

    stops = TrainerCallback()
    stops.on_step_end = stop  # type: ignore[method-assign]
    callbacks = [*compression(["quantization", "pruning"]), stops]
    trainer = make_trainer(tiny_bert(), classification_data(), callbacks)
    with pytest.raises(TargetError, match="asked for sparsity"):
        trainer.train()
    assert instrumented(trainer.model) == []


def test_gates_of_finished_pruning_stay_if_quantization_fails(
    make_trainer: Any, tiny_bert: Any, classification_data: Any
) -> None:
    config = PruningConfig(structures={"hidden": 0.25}, begin=1, end=3, update_every=1)
    callbacks = [PruningCallback(config), Does("on_train_end", fail), *compression(["quantization"])]
    trainer = make_trainer(tiny_bert(), classification_data(), callbacks)
    with pytest.raises(PowerCutError), pytest.warns(UserWarning, match="gates stay"):
        trainer.train()
    assert modules_with_final_gates(trainer.model) == instrumented(trainer.model) != []
    assert instrumented(shrink(trainer)) == []
