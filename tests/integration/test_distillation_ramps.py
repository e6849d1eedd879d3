"""Alpha and temperature that change while training runs: what is used in every step, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from resumable import STEPS_PER_EPOCH, StopAt, assert_same, distillation, results_of, trainer_of
from torch import Tensor
from transformers import Trainer, TrainerCallback
from zoo import randomize

from hf_compress import ConfigError, DistillationConfig, Ramp, preview
from hf_compress.callbacks.distillation import DistillationCallback

NUM_STEPS = 8
RAMPS: dict[str, tuple[Ramp, list[float]]] = {
    "over the run": (Ramp(start=0.1, stop=0.9), [0.1 + 0.8 * step / 7 for step in range(8)]),
    "down": (Ramp(start=0.9, stop=0.1, begin=2, end=7), [0.9, 0.9, 0.9, 0.7, 0.5, 0.3, 0.1, 0.1]),
    "by fractions": (Ramp(start=0.2, stop=0.6, begin=0.25, end=0.875), [0.2, 0.2, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6]),
    "by epochs": (
        Ramp(start=0.2, stop=1.0, begin="0.5 epochs", end="1.5 epochs"),
        [0.2, 0.2, 0.2, 0.2 + 0.8 / 3, 0.2 + 1.6 / 3, 1.0, 1.0, 1.0],
    ),
    "cubic": (
        Ramp(start=0.2, stop=1.0, begin=0, end=4, schedule="cubic"),
        [0.2 + 0.8 * (1 - (1 - min(step, 3) / 3) ** 3) for step in range(8)],
    ),
    "at once": (Ramp(start=0.3, stop=0.6, begin=3, end=3), [0.3, 0.3, 0.3, 0.6, 0.6, 0.6, 0.6, 0.6]),
    "in one step": (Ramp(start=0.3, stop=0.6, begin=3, end=4), [0.3, 0.3, 0.3, 0.6, 0.6, 0.6, 0.6, 0.6]),
}


class ByHand(Trainer):
    """Mixes with the alpha and the temperature of each step."""

    teacher: Any
    alphas: list[float]
    temperatures: list[float]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        alpha, temperature = self.alphas[self.state.global_step], self.temperatures[self.state.global_step]
        with torch.no_grad():
            p = F.softmax(self.teacher(**inputs).logits / temperature, dim=-1)
        q = F.log_softmax(outputs.logits / temperature, dim=-1)
        divergence = temperature**2 * F.kl_div(q, p, reduction="batchmean")
        return (1 - alpha) * outputs.loss + alpha * divergence


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))


def teacher() -> Any:
    return randomize(tiny_models.bert(hidden_size=16), 1).double()


def gradients(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Trainer], *made: Any, **facts: Any) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr("resumable.Trainer", kind)
        found = Gradients()
        args = {"max_steps": NUM_STEPS, "save_strategy": "no", "optim": "sgd", "max_grad_norm": 0.0}
        trainer = trainer_of([*made, found], folder, model=tiny_models.bert().double(), **args)
    vars(trainer).update(facts)
    trainer.train()
    return found.steps


@pytest.mark.parametrize("which", ["alpha", "temperature"])
@pytest.mark.parametrize("case", RAMPS)
def test_every_step_has_the_value_of_the_formula(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, which: str
) -> None:
    assert NUM_STEPS == 2 * STEPS_PER_EPOCH
    ramp, values = RAMPS[case]
    config = DistillationConfig(**{"alpha": 0.7, "temperature": 3.0, which: ramp})
    ours = gradients(tmp_path, monkeypatch, Trainer, DistillationCallback(config, teacher()))
    constant = {"alphas": [0.7] * NUM_STEPS, "temperatures": [3.0] * NUM_STEPS, f"{which}s": values}
    by_hand = gradients(tmp_path, monkeypatch, ByHand, teacher=teacher().eval(), **constant)
    assert len(ours) == len(by_hand) == NUM_STEPS
    for own, theirs in zip(ours, by_hand, strict=True):
        assert float((own - theirs).norm()) <= 1e-9 * float(theirs.norm())


def test_logged_losses_add_up_with_the_alpha_of_each_step(tmp_path: Path) -> None:
    ramp, values = RAMPS["down"]
    made = [distillation(alpha=ramp)]
    trainer = trainer_of(
        made, tmp_path, max_steps=NUM_STEPS, save_strategy="no", logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == NUM_STEPS
    for entry, alpha in zip(logs, values, strict=True):
        mixed = (1 - alpha) * entry["task_loss"] + alpha * entry["distillation_loss"]
        assert entry["loss"] == pytest.approx(mixed, rel=1e-4)


def test_a_run_that_is_resumed_goes_on_where_the_ramp_was(tmp_path: Path) -> None:
    """Law 5, bit for bit."""

    def run(folder: str, *others: TrainerCallback, resume: bool = False) -> Trainer:
        ramps = {"alpha": Ramp(start=0.9, stop=0.1), "temperature": Ramp(start=1.0, stop=4.0, begin=1, end=6)}
        trainer = trainer_of([distillation(**ramps), *others], tmp_path / folder, max_steps=NUM_STEPS)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run("straight")
    run("cut", StopAt(3))
    assert_same(results_of(run("cut", resume=True)), results_of(straight))


def test_preview_says_from_where_to_where(tmp_path: Path) -> None:
    ramp = Ramp(start=1.0, stop=4.0, begin=1, end="1 epoch", schedule="cubic")
    told = preview(trainer_of([distillation(temperature=ramp)], tmp_path, max_steps=NUM_STEPS))
    assert told.sections["distillation"]["temperature"] == "1 to 4, cubic, from 1 to 1 epoch"


HIDDEN = {"loss": "hidden_mse", "layers": "last"}
PLACES: dict[str, Callable[[Ramp], dict[str, Any]]] = {
    "alpha": lambda ramp: {"alpha": ramp},
    "temperature": lambda ramp: {"temperature": ramp},
    r"features\[1\]\.weight": lambda ramp: {"features": [HIDDEN, {**HIDDEN, "weight": ramp}]},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("begin", "end", "message"),
    [
        (6, 0.5, "begin=6 and end=0.5, which are steps 6 and 4; the run has 8 .*begin must not be later than end"),
        (8, 9, "are steps 8 and 9; the run has 8 optimizer steps.*both lie within the run"),
        ("2 epochs", 1.0, "steps 8 and 8; the run has 8"),
        (0, 9, "steps 0 and 9; the run has 8"),
        (0.5, "3 epochs", "steps 4 and 12; the run has 8"),
    ],
)
def test_windows_that_do_not_fit_the_run_are_refused_before_it(
    tmp_path: Path, place: str, begin: Any, end: Any, message: str
) -> None:
    ramp = Ramp(start=0.2, stop=0.9, begin=begin, end=end)
    trainer = trainer_of([distillation(**PLACES[place](ramp))], tmp_path, max_steps=NUM_STEPS)
    with pytest.raises(ConfigError, match=rf"^DistillationConfig\.{place}: a Ramp with .*{message}"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not trainer.model._forward_hooks
