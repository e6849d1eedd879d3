"""Law 1: callbacks that change nothing leave training as it is, bit for bit, whatever the Trainer's options."""

from typing import Any

import pytest
from training_runs import (
    NUM_EXAMPLES,
    OPTIONS,
    SCHEDULERS,
    Recorder,
    as_on_a_gpu,
    history,
    instrumented,
    neutral,
    same,
    slow_unless,
)

METHODS = {"pruning": ("pruning",), "quantization": ("quantization",), "both": ("quantization", "pruning")}

CASES = [
    *(pytest.param(option, ["both"], id=option) for option in OPTIONS),
    *(
        slow_unless(option == "ragged accumulation", option, ["pruning", "quantization"], name=f"{option}, alone")
        for option in OPTIONS
    ),
]


@pytest.fixture
def trained(tiny_bert: Any, classification_data: Any, make_trainer: Any) -> Any:
    """``trained(args, callbacks)``: the Trainer after training a BERT with dropout, and the recorder."""

    def train(args: dict[str, Any], callbacks: list[Any]) -> tuple[Any, Recorder]:
        recorder = Recorder()
        options = {"logging_strategy": "steps", "logging_steps": 1, "max_steps": 5, **args}
        trainer = make_trainer(tiny_bert(), classification_data(NUM_EXAMPLES), [*callbacks, recorder], **options)
        as_on_a_gpu(trainer).train()
        return trainer, recorder

    return train


def check_neutral(trained: Any, args: dict[str, Any], methods: list[str]) -> None:
    trainer, plain = trained(args, [])
    steps = len(plain.weights)
    assert steps >= 4
    for names in (METHODS[method] for method in methods):
        other, recorder = trained(args, neutral(names, steps))
        untouched = steps - 1 if "quantization" in names else steps
        for step in range(untouched):
            assert same(recorder.gradients[step], plain.gradients[step]), f"{names}: gradients of step {step + 1}"
            assert same(recorder.weights[step], plain.weights[step]), f"{names}: weights after step {step + 1}"
        assert len(recorder.weights) == steps
        assert history(other, untouched) == history(trainer, untouched)
        if "quantization" in names:  # the callbacks were there
            assert instrumented(other.model)
            assert not same(recorder.weights[-1], plain.weights[-1])
        else:
            assert not instrumented(other.model)


@pytest.mark.parametrize(("option", "methods"), CASES)
def test_options_keep_neutral_callbacks_neutral(trained: Any, option: str, methods: list[str]) -> None:
    check_neutral(trained, OPTIONS[option], methods)


STEPS_ON_METRICS = "reduce_lr_on_plateau"


@pytest.mark.parametrize("name", [slow_unless(name == STEPS_ON_METRICS, name, name=name) for name in SCHEDULERS])
def test_learning_rate_schedules_keep_neutral_callbacks_neutral(trained: Any, name: str) -> None:
    check_neutral(trained, SCHEDULERS[name], ["both"])


def test_every_schedule_of_transformers_is_covered() -> None:
    from transformers import SchedulerType

    assert set(SCHEDULERS) == {each.value for each in SchedulerType}
