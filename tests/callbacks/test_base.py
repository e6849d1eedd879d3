"""The life of a callback under a real Trainer, seen through one that only keeps a diary."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from thread_ranks import outcomes
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from transformers import Trainer, TrainerCallback

from hf_compress.callbacks.base import CompressionCallback, Run, check_setup
from hf_compress.callbacks.ranks import all_reduce_mean
from hf_compress.callbacks.state import JSON_FILE, TENSOR_FILE
from hf_compress.config import DistillationConfig
from hf_compress.errors import TrainingError


class Diary(CompressionCallback):
    """Counts optimizer steps in a tensor and writes down what happens."""

    section = "diary"

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__(DistillationConfig(alpha=alpha))
        self.events: list[Any] = []
        self.models: list[Any] = []
        self.steps = torch.zeros(1)
        self.installed = False

    def _start(self, run: Run) -> None:
        assert not self.installed
        self.installed = True
        self.steps = torch.zeros(1)
        self.models.append(run.model)
        self.events.append("start")

    def _stop(self, run: Run) -> None:
        self.events.append("stop")
        super()._stop(run)

    def _remove(self) -> None:
        if self.installed:
            self.events.append("remove")
        self.installed = False

    def _state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        return {"steps": self.steps}, {"steps": int(self.steps)}

    def _restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.steps = tensors["steps"].clone()
        assert facts == {"steps": int(self.steps)}
        self.events.append(f"restore {facts['steps']}")

    def _metrics(self) -> Mapping[str, float]:
        return {"diary_steps": float(self.steps)}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


class SecondDiary(Diary):
    section = "second"


class At(TrainerCallback):
    """Does something at the end of one optimizer step."""

    def __init__(self, step: int, action: Callable[..., Any]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(control)


@pytest.fixture
def train(make_trainer: Any, tiny_bert: Any, classification_data: Any) -> Callable[..., Trainer]:
    """``train(callbacks, resume=None, **args)``: make a Trainer, train, return it."""

    def run(callbacks: Any, resume: Any = None, **args: Any) -> Trainer:
        trainer = make_trainer(tiny_bert(), classification_data(), callbacks, **args)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def stop(control: Any) -> None:
    control.should_training_stop = True


def fail(control: Any) -> None:
    raise RuntimeError("power cut")


def test_a_run_starts_once_and_stops_once(train: Any, tmp_path: Path) -> None:
    diary = Diary()
    trainer = train([diary])
    assert diary.events == ["start", "stop", "remove"]
    assert diary.models == [trainer.model]
    assert list((tmp_path / "run").iterdir()) == []


def test_training_again_starts_anew(train: Any) -> None:
    diary = Diary()
    trainer = train([diary])
    trainer.train()
    assert diary.events == ["start", "stop", "remove"] * 2
    assert int(diary.steps) == 4


def test_a_crash_takes_the_callback_off(train: Any) -> None:
    diary, crash = Diary(), At(2, fail)
    with pytest.raises(RuntimeError, match="power cut"):
        train([diary, crash])
    assert diary.events == ["start", "remove"]
    train([diary])
    assert diary.events == ["start", "remove", "start", "stop", "remove"]


def test_a_smaller_batch_size_after_running_out_of_memory(train: Any) -> None:
    tries = []

    def run_out_once(control: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("CUDA out of memory.")

    diary = Diary()
    train([diary, At(2, run_out_once)], auto_find_batch_size=True)
    assert diary.events == ["start", "remove", "start", "stop", "remove"]
    assert int(diary.steps) == 4


def test_a_model_made_by_model_init_is_the_one_that_counts(
    make_trainer: Any, tiny_bert: Any, classification_data: Any
) -> None:
    diary = Diary()
    trainer = make_trainer(None, classification_data(), [diary], trainer_options={"model_init": lambda: tiny_bert()})
    before = trainer.model
    trainer.train()
    assert diary.models == [trainer.model]
    assert trainer.model is not before


def test_what_others_log_stays_as_it_is(train: Any) -> None:
    """Metrics may be means over ranks, and only the Trainer's own log is one that every rank makes."""
    diary = Diary()
    log = At(1, lambda control: diary._run.trainer.log({"loss": 5.0}))
    trainer = train([diary, log], logging_strategy="steps", logging_steps=2, max_steps=2)
    mine = [entry for entry in trainer.state.log_history if entry.get("loss") == 5.0]
    assert [set(entry) for entry in mine] == [{"loss", "epoch", "step"}]
    assert [entry["diary_steps"] for entry in trainer.state.log_history if "learning_rate" in entry] == [2.0]


def test_metrics_reach_the_log_history_and_the_log_method_is_given_back(train: Any) -> None:
    trainer = train([Diary(), SecondDiary()], logging_strategy="steps", logging_steps=2)
    logged = [entry["diary_steps"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [2.0, 4.0]
    assert "log" not in vars(trainer)


@pytest.mark.parametrize("first", [Diary, SecondDiary])
def test_one_state_holds_all_callbacks(train: Any, tmp_path: Path, first: type[Diary]) -> None:
    callbacks = [Diary(), SecondDiary()] if first is Diary else [SecondDiary(), Diary()]
    train(callbacks, save_strategy="steps", save_steps=2)
    for step in (2, 4):
        document = json.loads((tmp_path / "run" / f"checkpoint-{step}" / JSON_FILE).read_text())
        assert document["global_step"] == step
        assert {name: section["facts"] for name, section in document["sections"].items()} == {
            "diary": {"steps": step},
            "second": {"steps": step},
        }


@pytest.mark.parametrize("as_path", [str, Path, bool])
def test_resuming_restores_after_starting(train: Any, tmp_path: Path, as_path: Any) -> None:
    train([Diary(), At(2, stop)], save_strategy="steps", save_steps=2)
    diary = Diary()
    folder = tmp_path / "run" / "checkpoint-2"
    train([diary], resume=True if as_path is bool else as_path(folder))
    assert diary.events == ["start", "restore 2", "stop", "remove"]
    assert int(diary.steps) == 4


def test_resuming_from_another_folder_than_the_output(train: Any, tmp_path: Path) -> None:
    train([Diary(), At(2, stop)], save_strategy="steps", save_steps=2)
    elsewhere = tmp_path / "kept"
    shutil.move(tmp_path / "run" / "checkpoint-2", elsewhere)
    diary = Diary()
    train([diary], resume=str(elsewhere))
    assert "restore 2" in diary.events


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("callbacks", "damage", "message"),
    [
        (lambda: [Diary(alpha=0.25)], None, r"alpha: 0\.5 in the checkpoint, 0\.25 now"),
        (lambda: [SecondDiary()], None, r"saved with callbacks for \['diary'\].*callbacks for \['second'\]"),
        (lambda: [Diary(), SecondDiary()], None, r"callbacks for \['diary', 'second'\]"),
        (lambda: [Diary()], JSON_FILE, r"checkpoint-4: no hf_compress_state.json.*\(checkpoint-2\)"),
        (lambda: [Diary()], TENSOR_FILE, "no hf_compress_state.safetensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_training(
    train: Any, tmp_path: Path, callbacks: Any, damage: str | None, message: str
) -> None:
    train([Diary()], save_strategy="steps", save_steps=2)
    if damage:
        (tmp_path / "run" / "checkpoint-4" / damage).unlink()
    before = files_of(tmp_path)
    resumed = callbacks()
    with pytest.raises(TrainingError, match=message):
        train(resumed, resume=True, max_steps=8)
    assert files_of(tmp_path) == before
    assert not any(callback.installed for callback in resumed)
    assert all(int(callback.steps) == 0 for callback in resumed)


def test_a_checkpoint_made_without_callbacks_cannot_be_resumed_with_them(train: Any) -> None:
    train([At(2, stop)], save_strategy="steps", save_steps=2)
    with pytest.raises(TrainingError, match="made without compression callbacks"):
        train([Diary()], resume=True)


def test_the_best_checkpoint_is_read_before_stopping(train: Any) -> None:
    diary = Diary()
    trainer = train(
        [diary],
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best checkpoint is not the last one
    )
    best = trainer.state.best_global_step
    assert best < 4
    assert diary.events == ["start", f"restore {best}", "stop", "remove"]


def test_the_state_is_there_before_a_checkpoint_is_uploaded(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[set[str]] = []

    def upload_folder(*, folder_path: Any, **kwargs: Any) -> Any:
        uploads.append({path.name for path in Path(folder_path).iterdir()})
        return SimpleNamespace(done=lambda: True, result=lambda: None, is_done=lambda: True)

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    trainer = make_trainer(
        tiny_bert(),
        classification_data(),
        [Diary()],
        save_strategy="steps",
        save_steps=4,
        hub_strategy="checkpoint",
    )
    trainer.args.push_to_hub = True
    trainer.hub_model_id, trainer.push_in_progress = "nobody/nothing", None
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.train()
    assert uploads, "nothing was uploaded"
    assert {JSON_FILE, TENSOR_FILE} <= uploads[-1]


class Fails(SecondDiary):
    def _start(self, run: Run) -> None:
        super()._start(run)
        raise TrainingError("cannot start")


@pytest.mark.parametrize("what", ["config", "state", "callbacks"])
def test_ranks_with_other_settings_or_states_are_an_error_on_each(what: str) -> None:
    def work(rank: int) -> None:
        odd = rank == 1
        diary = Diary(alpha=0.9 if odd and what == "config" else 0.5)
        diary.steps += odd and what == "state"
        callbacks = [diary, *([SecondDiary()] if odd and what == "callbacks" else [])]
        trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=callbacks))
        diary._check_ranks_agree(SimpleNamespace(trainer=trainer, args=SimpleNamespace(device=torch.device("cpu"))))

    errors = outcomes(work)
    assert [type(each) for each in errors] == [TrainingError] * 2
    first = f"Diary: callbacks, config or state differ between the 2 processes (first difference: {what!r})"
    assert all(first in str(each) for each in errors)


@pytest.mark.parametrize("turned", [False, True])
def test_a_callback_that_fails_to_start_takes_the_others_off(train: Any, turned: bool) -> None:
    callbacks = [Diary(), Fails()]
    with pytest.raises(TrainingError, match="cannot start"):
        train(callbacks[::-1] if turned else callbacks)
    assert not any(callback.installed for callback in callbacks)


class EndsBadly(Diary):
    def _stop(self, run: Run) -> None:
        raise TrainingError("missed")


def test_a_callback_that_fails_at_the_end_takes_the_others_off(train: Any) -> None:
    callbacks = [EndsBadly(), SecondDiary()]
    with pytest.raises(TrainingError, match="missed"):
        train(callbacks)
    assert [callback.events[-1] for callback in callbacks] == ["remove", "remove"]
    assert not any(callback.installed for callback in callbacks)


def test_two_callbacks_for_the_same_thing_are_refused(train: Any) -> None:
    with pytest.raises(TrainingError, match="two callbacks for diary"):
        train([Diary(), Diary()])


def test_a_callback_added_while_training_is_noticed(train: Any) -> None:
    diary = Diary()
    early = SecondDiary()
    add = At(1, lambda control: early._run.trainer.add_callback(diary))
    with pytest.raises(TrainingError, match="added after training had begun"):
        train([early, add])


def test_the_trainer_can_be_named_where_it_is_not_found(
    make_trainer: Any, tiny_bert: Any, classification_data: Any
) -> None:
    trainer = make_trainer(tiny_bert(), classification_data())
    trainer.create_optimizer()
    diary = Diary()
    with pytest.raises(TrainingError, match=r"Call callback.attach\(trainer\)"):
        diary.on_train_begin(trainer.args, trainer.state, trainer.control)
    diary.attach(trainer)
    diary.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert diary.models == [trainer.model]


def test_parameters_that_the_optimizer_lacks_are_named(train: Any, tiny_bert: Any) -> None:
    trainer = train([Diary()])
    trainer.model.classifier = torch.nn.Linear(32, 3)
    with pytest.raises(TrainingError, match=r"lacks 2 .*first: 'classifier.weight'.*trainer.optimizer = "):
        trainer.train()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda trainer: setattr(trainer.args, "_n_gpu", 2), "one process drives 2 GPUs"),
        (lambda trainer: setattr(trainer, "is_deepspeed_enabled", True), "DeepSpeed"),
        (lambda trainer: setattr(trainer, "is_fsdp_xla_enabled", True), "FSDP version 1"),
        (lambda trainer: setattr(trainer.model, "is_quantized", True), "is quantized already"),
        (
            lambda trainer: setattr(trainer, "model", torch.nn.Linear(1, 1)),
            "allowed: a transformers PreTrainedModel",
        ),
    ],
)
def test_setups_in_which_callbacks_cannot_work_are_refused(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, change: Any, message: str
) -> None:
    trainer = make_trainer(tiny_bert(), classification_data())
    trainer.create_optimizer()
    check_setup(trainer)
    change(trainer)
    with pytest.raises(TrainingError, match=message):
        check_setup(trainer)


@pytest.mark.parametrize(
    ("world", "counted", "refused"), [("2", 1, True), ("1", 1, False), ("", 1, False), ("2", 2, False)]
)
def test_launched_processes_that_the_trainer_does_not_count_are_refused(
    make_trainer: Any,
    tiny_bert: Any,
    classification_data: Any,
    monkeypatch: Any,
    world: str,
    counted: int,
    refused: bool,
) -> None:
    diary = Diary()
    trainer = make_trainer(tiny_bert(), classification_data(), [diary])
    # Set afterwards: with use_cpu, TrainingArguments would wait for the other process.
    monkeypatch.setenv("WORLD_SIZE", world)
    if refused:
        with pytest.raises(
            TrainingError, match=r"WORLD_SIZE is 2 .*\.world_size is 1.*TrainingArguments\(use_cpu=True\)"
        ):
            trainer.train()
        assert "start" not in diary.events
    else:
        trainer.args.distributed_state = SimpleNamespace(num_processes=counted)
        check_setup(trainer)


@pytest.mark.parametrize(("version", "refused"), [(1, True), (2, False)])
def test_fsdp_needs_version_2(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, version: int, refused: bool
) -> None:
    trainer = make_trainer(tiny_bert(), classification_data())
    trainer.create_optimizer()
    trainer.is_fsdp_enabled = True
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
    trainer.accelerator = SimpleNamespace(state=state)
    if refused:
        with pytest.raises(TrainingError, match="FSDP version 1"):
            check_setup(trainer)
    else:
        check_setup(trainer)


def fsdp(**settings: Any) -> dict[str, Any]:
    return {"fsdp_plugin": SimpleNamespace(fsdp_version=2, **settings)}


@pytest.mark.parametrize(
    ("state", "config", "message"),
    [
        ({}, ParallelismConfig(tp_size=2), r"tp_size \(tensor parallelism\) is 2.*Use DDP or FSDP version 2"),
        (fsdp(), ParallelismConfig(cp_size=2), r"cp_size \(context parallelism\) is 2"),
        (fsdp(), ParallelismConfig(sp_size=4), r"sp_size \(sequence parallelism\) is 4"),
        (fsdp(cpu_offload=CPUOffloadPolicy()), None, "Set offload_params to false"),
        (fsdp(cpu_offload=OffloadPolicy()), ParallelismConfig(dp_shard_size=2), None),
    ],
)
def test_ranks_that_share_a_batch_or_offload_are_refused(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, state: Any, config: Any, message: str | None
) -> None:
    """Accelerate has none of this on CPUs, so its settings stand in for it."""
    trainer = make_trainer(tiny_bert(), classification_data())
    trainer.create_optimizer()
    trainer.is_fsdp_enabled = bool(state)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(**state), parallelism_config=config)
    if message is None:
        check_setup(trainer)
    else:
        with pytest.raises(TrainingError, match=message):
            check_setup(trainer)


def test_a_mean_over_one_rank_is_the_tensor_itself() -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert all_reduce_mean(tensor) is tensor
