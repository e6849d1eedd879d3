"""Maps between widths: trained by the callback, in no one's state but its own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from features_by_hand import config, examples, models
from safetensors.torch import load_file
from torch import Tensor
from training_runs import Recorder, StopAt, as_on_a_gpu, distance, same
from transformers import TrainerCallback

from hf_compress import DistillationCallback, TrainingError
from hf_compress.callbacks.projections import RIDGE, Projections
from hf_compress.callbacks.state import read_state

MAPS = ["hidden_mse.encoder.0", "hidden_mse.encoder.1"]
ADAM = ["mean", "square", "steps"]
SAVE = {"save_strategy": "steps", "save_steps": 1}


class Watch(TrainerCallback):
    """Keeps what the callback would store, after every step."""

    def __init__(self, callback: DistillationCallback) -> None:
        self.callback = callback
        self.states: list[dict[str, Tensor]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.on_step_end()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.states.append({name: each.clone() for name, each in self.callback._state()[0].items()})


def wide(**changes: Any) -> tuple[Any, DistillationCallback, Watch]:
    """A student and a callback with a wider teacher."""
    student, teacher = models("bert", teacher={"hidden_size": 48})
    callback = DistillationCallback(config("hidden_mse", learning_rate=0.01, **changes), teacher)
    return student, callback, Watch(callback)


def test_the_fit_is_least_squares_over_the_positions_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 6, width, generator=generator) for width in (5, 3))
    mask = torch.rand(4, 6, generator=generator) > 0.3
    student[~mask] = 1e6
    maps = Projections()
    maps.fit("a", student, teacher, mask, 0.1)
    x, y = student[mask].double(), teacher[mask].double()
    ridge = (RIDGE * x.square().sum(0).mean()).sqrt()
    padded = torch.cat([x, ridge * torch.eye(5)]), torch.cat([y, torch.zeros(5, 3)])
    torch.testing.assert_close(maps.tensors["a"].double(), torch.linalg.lstsq(*padded).solution, rtol=1e-4, atol=1e-5)
    assert maps.tensors["a"].requires_grad
    assert maps.rates == {"a": 0.1}
    result = maps.apply("a", student[mask])
    assert ((result - y).square().mean() / y.square().mean()) < 1


def test_features_that_are_constant_have_a_fit() -> None:
    maps = Projections()
    maps.fit("zeros", torch.zeros(1, 2, 3), torch.ones(1, 2, 2), torch.ones(1, 2).bool(), 0.1)
    assert torch.equal(maps.tensors["zeros"], torch.zeros(3, 2))


def test_half_precision_is_projected_in_single_precision() -> None:
    maps = Projections()
    student = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    maps.fit("a", student.bfloat16(), student.bfloat16(), torch.ones(2, 3).bool(), 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert maps.apply("a", student.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("projection", ["where needed", "always"])
def test_maps_are_made_where_they_are_asked_for(make_trainer: Any, projection: str) -> None:
    student, teacher = models("bert")
    callback = DistillationCallback(config("hidden_mse", projection=projection), teacher)
    watch = Watch(callback)
    make_trainer(student, examples("bert"), [callback, watch], max_steps=1).train()
    assert sorted(watch.states[0]) == (MAPS if projection == "always" else [])


def test_maps_learn_outside_model_and_optimizer(make_trainer: Any) -> None:
    student, callback, watch = wide()
    names = list(student.state_dict())
    trainer = make_trainer(student, examples("bert"), [callback, watch], max_steps=3)
    trainer.train()
    for name in MAPS:
        shapes = {tuple(state[name].shape) for state in watch.states}
        assert shapes == {(32, 48)}
        assert all(not torch.equal(a[name], b[name]) for a, b in zip(watch.states, watch.states[1:], strict=False))
        assert float(watch.states[-1][f"{name}/steps"]) == 3
    assert list(student.state_dict()) == names
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held <= {id(p) for p in student.parameters()}


def test_maps_change_nothing_but_how_the_student_learns(make_trainer: Any) -> None:
    """With a learning rate next to nothing the maps stay, and the student is taught all the same."""
    flats = []
    for rate in (0.01, 1e-12):
        student, teacher = models("bert", teacher={"hidden_size": 48})
        callback = DistillationCallback(config("hidden_mse", learning_rate=rate), teacher)
        recorder = Recorder()
        make_trainer(student, examples("bert"), [callback, recorder], max_steps=2).train()
        flats.append(recorder.gradients)
    assert distance(flats[0][0], flats[1][0]) == 0
    assert distance(flats[0][1], flats[1][1]) > 1e-4


def test_the_fp16_loss_scale_is_taken_off(make_trainer: Any) -> None:
    """Adam hides a wrong scale in where it goes, but not in what it remembers."""
    states = []
    for extra in ({}, {"fp16": True}):
        student, callback, watch = wide()
        args = {"max_steps": 2, "learning_rate": 1e-4, **extra}
        as_on_a_gpu(make_trainer(student, examples("bert"), [callback, watch], **args)).train()
        states.append(watch.states[-1])
    for name in MAPS:
        plain, scaled = (float(state[f"{name}/mean"].norm()) for state in states)
        assert scaled == pytest.approx(plain, rel=0.2)


@pytest.mark.parametrize(
    ("args", "layers"),
    [({}, "dynamic"), ({"fp16": True}, "same"), ({"gradient_accumulation_steps": 2}, "same")],
    ids=str,
)
def test_a_resumed_run_ends_where_a_straight_one_does(
    make_trainer: Any, tmp_path: Path, args: dict[str, Any], layers: str
) -> None:
    """Law 5, bit for bit, for maps and model."""
    ends = []
    for stops in ((), (2,)):
        output = str(tmp_path / f"{len(stops)}")
        for stop in (*stops, None):
            student, callback, watch = wide(layers=layers)
            options = {"max_steps": 4, "output_dir": output, **SAVE, **args}
            callbacks = [callback, watch, StopAt(stop)]
            trainer = as_on_a_gpu(make_trainer(student, examples("bert"), callbacks, **options))
            trainer.train(resume_from_checkpoint=bool(stops) and stop is None)
        ends.append({**student.state_dict(), **watch.states[-1]})
    assert same(*ends)
    assert float(ends[0][f"{MAPS[0]}/steps"]) == 4


def test_checkpoints_hold_maps_beside_a_plain_model(make_trainer: Any, tmp_path: Path) -> None:
    """Law 4."""
    student, callback, watch = wide()
    make_trainer(student, examples("bert"), [callback, watch], max_steps=2, **SAVE).train()
    folder = tmp_path / "run" / "checkpoint-2"
    assert set(load_file(folder / "model.safetensors")) == set(student.state_dict())
    stored = read_state(folder, 2)["distillation"].tensors
    assert set(stored) == {*MAPS, *(f"{name}/{part}" for name in MAPS for part in ADAM)}


def test_the_best_checkpoint_brings_its_maps_back(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student, callback, watch = wide()
    ended = []
    stop = callback._stop
    monkeypatch.setattr(callback, "_stop", lambda run: (ended.append(dict(callback._state()[0])), stop(run)))
    losses = iter([1.0, 0.5, 2.0, 3.0])

    def metrics(prediction: Any) -> dict[str, float]:
        return {"quality": next(losses)}

    args = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 4, **SAVE}
    args |= {"metric_for_best_model": "quality", "greater_is_better": False}
    options = {"compute_metrics": metrics}
    make_trainer(student, examples("bert"), [callback, watch], trainer_options=options, **args).train()
    assert same(ended[0], watch.states[2])
    assert not same(ended[0], watch.states[4])


def test_a_second_run_fits_anew(make_trainer: Any) -> None:
    student, callback, watch = wide()
    trainer = make_trainer(student, examples("bert"), [callback, watch], max_steps=2, per_device_train_batch_size=8)
    trainer.train()
    trained = copy.deepcopy(student)
    trainer.train()
    assert sorted(watch.states[3]) == MAPS
    fresh = DistillationCallback(callback.config, callback.teacher)
    other = Watch(fresh)
    make_trainer(trained, examples("bert"), [fresh, other], max_steps=1, per_device_train_batch_size=8).train()
    for name in MAPS:
        torch.testing.assert_close(watch.states[3][name], other.states[0][name], rtol=1e-3, atol=1e-4)
        assert distance({name: watch.states[3][name]}, {name: watch.states[2][name]}) > 1e-3


def test_each_of_several_teachers_has_its_maps(make_trainer: Any) -> None:
    student = models("bert")[0]
    teachers = [models("bert", teacher={"hidden_size": size})[1] for size in (32, 48, 16)]
    callback = DistillationCallback(config("hidden_mse", learning_rate=0.01), teachers)
    watch = Watch(callback)
    make_trainer(student, examples("bert"), [callback, watch], max_steps=2).train()
    shapes = {name: tuple(each.shape) for name, each in watch.states[0].items()}
    assert shapes == {f"{name}.teacher {i}": (32, width) for name in MAPS for i, width in ((1, 48), (2, 16))}
    assert all(not torch.equal(watch.states[0][name], watch.states[2][name]) for name in shapes)


def test_maps_of_another_shape_are_refused() -> None:
    maps = Projections()
    maps.fit("a", torch.ones(1, 2, 3), torch.ones(1, 2, 2), torch.ones(1, 2).bool(), 0.1)
    for stored in ({}, {"a": torch.zeros(3, 3)}):
        with pytest.raises(TrainingError, match=r"no projection 'a' of shape \[3, 2\]. Resume with the features"):
            maps.restore(stored)
