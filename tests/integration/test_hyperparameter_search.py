"""``trainer.hyperparameter_search``: a fresh model for every trial, trials that are given up, folders of their own."""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from training_runs import METHODS, NUM_EXAMPLES, cases_of_methods, compression, instrumented, neutral
from transformers import Trainer, TrainerCallback
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    QuantizationCallback,
    QuantizationConfig,
    ShrinkError,
    shrink,
)

RATES = [1e-3, 1e-1]


class GivenUpError(Exception):
    """Stands in for ``optuna.TrialPruned``."""


class Trial(SimpleNamespace):
    """Stands in for ``optuna.Trial``."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        self.params[name] = choices[self.number]
        return self.params[name]

    def report(self, value: float, step: int) -> None:
        self.last = step

    def should_prune(self) -> bool:
        return self.last == self.give_up_at


class Backend:
    """Tries one learning rate after the other, in the steps of transformers' own optuna backend."""

    def __init__(self, give_up: dict[int, int]) -> None:
        self.give_up = give_up
        self.objectives: list[float | None] = []

    def __call__(self) -> "Backend":
        return self

    def ensure_available(self) -> None:
        pass

    def run(self, trainer: Trainer, n_trials: int, direction: str) -> None:
        study = SimpleNamespace(_is_multi_objective=lambda: False)
        for number in range(n_trials):
            trainer.objective = None
            trial = Trial(number=number, params={}, study=study, give_up_at=self.give_up.get(number))
            try:
                trainer.train(trial=trial)
            except GivenUpError:
                self.objectives.append(None)
            else:
                self.objectives.append(trainer.objective)


@pytest.fixture
def search(tiny_bert: Any, classification_data: Any, make_trainer: Any, monkeypatch: Any) -> Callable[..., Any]:
    """``search(callbacks, give_up={})``: the Trainer and the backend after a trial of each rate."""

    def run(callbacks: list[Any], give_up: dict[int, int] | None = None, **options: Any) -> tuple[Trainer, Backend]:
        backend = Backend(give_up or {})
        monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, backend)
        optuna = ModuleType("optuna")
        optuna.__spec__ = ModuleSpec("optuna", None)  # transformers looks for it
        optuna.TrialPruned, optuna.trial = GivenUpError, SimpleNamespace(BaseTrial=Trial)
        monkeypatch.setitem(sys.modules, "optuna", optuna)
        trainer = make_trainer(
            None,
            classification_data(NUM_EXAMPLES),
            callbacks,
            trainer_options={"model_init": lambda trial: tiny_bert()},
            eval_strategy="steps",
            eval_steps=2,
            **options,
        )
        trainer.hyperparameter_search(hp_space=rates, n_trials=len(RATES), backend="optuna")
        return trainer, backend

    return run


def rates(trial: Any) -> dict[str, float]:
    return {"learning_rate": trial.suggest_categorical("learning_rate", RATES)}


@cases_of_methods("all")
def test_every_trial_is_compressed(search: Any, tiny_bert: Any, tmp_path: Path, method: str) -> None:
    callbacks = compression(METHODS[method], tiny_bert(seed=1))
    trainer, backend = search(callbacks, save_strategy="steps", save_steps=4)
    assert len(set(backend.objectives)) == len(RATES)
    for number in range(len(RATES)):
        folder = tmp_path / "run" / f"run-{number}" / "checkpoint-4"
        assert (folder / "hf_compress_state.json").is_file()
    if method in ("pruning", "all"):
        assert shrink(trainer).num_parameters() < 0.9 * trainer.model.num_parameters()


def test_trials_are_neutral(search: Any) -> None:
    """Law 1."""
    options = {"logging_strategy": "steps", "logging_steps": 1, "save_strategy": "no"}
    _, plain = search([], **options)
    _, pruned = search(neutral(("pruning",), 4), **options)
    assert plain.objectives == pruned.objectives
    assert len(set(plain.objectives)) == len(RATES)


@pytest.mark.parametrize("given_up", [0, 1])
@cases_of_methods("all")
def test_a_trial_that_is_given_up_is_no_error(search: Any, tiny_bert: Any, method: str, given_up: int) -> None:
    """The search ends it through ``on_train_end``, before any target can have been met, and goes on."""
    callbacks = compression(METHODS[method], tiny_bert(seed=1))
    trainer, backend = search(callbacks, {given_up: 2})
    assert [objective is None for objective in backend.objectives] == [n == given_up for n in range(len(RATES))]
    if given_up == len(RATES) - 1:
        assert not instrumented(trainer.model)
        assert not trainer.model._forward_hooks
        assert "log" not in vars(trainer)
        if method in ("pruning", "all"):
            with pytest.raises(ShrinkError, match="training has not finished"):
                shrink(trainer)


def test_optuna(tiny_bert: Any, classification_data: Any, make_trainer: Any) -> None:
    """The same with the real search, one trial of which is given up."""
    import optuna  # here, since other tests put something else in its place

    class SecondIsBad(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number == 1

    class Models(TrainerCallback):
        last: Any = None

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.last = model

    models, callbacks = Models(), compression(METHODS["all"], tiny_bert(seed=1))
    trainer = make_trainer(
        None,
        classification_data(NUM_EXAMPLES),
        [*callbacks, models],
        trainer_options={"model_init": lambda: tiny_bert()},
        eval_strategy="steps",
        eval_steps=2,
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)},
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=SecondIsBad(),
    )
    assert best.run_id in ("0", "2")
    assert trainer.model is None  # transformers lets go of it after every trial
    small = shrink(models.last, callbacks[0].masks())
    assert small.num_parameters() < 0.9 * models.last.num_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in small.parameters())


KEEPS_STATE: dict[str, Callable[[], list[Any]]] = {
    "movement": lambda: compression(["pruning"], criterion="movement", regrow=True),
    "l0": lambda: compression(["pruning"], criterion="l0"),
    "admm": lambda: compression(["pruning"], criterion="admm"),
    "learned steps": lambda: [QuantizationCallback(QuantizationConfig(method="lsq"))],
    "observed ranges": lambda: [QuantizationCallback(QuantizationConfig(scheme="int8_static", begin=2))],
    "projections and a copy of the student": lambda: [
        *compression(["pruning"]),
        DistillationCallback(
            DistillationConfig(alpha=0.5, features=[{"loss": "hidden_mse", "projection": "always"}]), teacher="self"
        ),
    ],
}


@pytest.mark.parametrize("method", KEEPS_STATE)
def test_nothing_of_a_trial_is_left_in_the_next(
    method: str, tiny_bert: Any, classification_data: Any, make_trainer: Any
) -> None:
    """Scores, masks, steps, projections and teachers: the same settings twice have the same outcome twice."""
    import optuna  # here, since other tests put something else in its place

    values = []
    trainer = make_trainer(
        None,
        classification_data(NUM_EXAMPLES),
        KEEPS_STATE[method](),
        trainer_options={"model_init": lambda: tiny_bert()},
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": (3e-2, 1e-3, 3e-2)[trial.number]},
        compute_objective=lambda metrics: values.append(metrics["eval_loss"]) or values[-1],
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    assert values[0] == values[2] != values[1]
