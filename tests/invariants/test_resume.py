"""Law 5: a resumed run ends, bit for bit, where a straight one does."""

import shutil

import pytest
import tiny_models
import torch
import transformers.trainer
from peft import LoraConfig, get_peft_model
from resumable import (
    METHODS,
    NUM_STEPS,
    QUANTIZING,
    STEPS_PER_EPOCH,
    AtSave,
    CutAfterSave,
    PowerCutError,
    assert_same,
    callbacks_of,
    distillation,
    pruning,
    quantization,
    results_of,
    tensors_of,
    trainer_of,
)
from safetensors import safe_open
from transformers import TrainerCallback

from hf_compress import TrainingError, last_complete_checkpoint, shrink
from hf_compress.callbacks.state import JSON_FILE, TENSOR_FILE

pytestmark = pytest.mark.filterwarnings("ignore:PruningCallback. gates stay:UserWarning")  # of layers

LAST = f"checkpoint-{NUM_STEPS}"

MID_EPOCH = 3
"""In the middle of an epoch, after the first change of the masks, when quantization is about to begin."""

QUICK = [
    *((method, MID_EPOCH) for method in METHODS if method not in QUANTIZING),
    ("quantization-qat", MID_EPOCH),
    *((method, MID_EPOCH + 1) for method in QUANTIZING if method != "quantization-qat"),
    *(("all", step) for step in (STEPS_PER_EPOCH, 7)),
    *(("lottery_ticket", step) for step in (1, 2, 4, 7)),
]
"""All together also at the end of an epoch, and just before the last change of the masks; a lottery ticket before and
after it keeps weights, and when and after it went back to them."""

OTHERS = [(method, step) for method in METHODS for step in range(1, NUM_STEPS) if (method, step) not in QUICK]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """``straight(method)``: the output folder and the results of an uninterrupted run, made once."""
    runs = {}

    def run(method):
        if method not in runs:
            folder = tmp_path_factory.mktemp(method)
            trainer = trainer_of(callbacks_of(method), folder)
            trainer.train()
            runs[method] = folder, results_of(trainer)
        return runs[method]

    return run


def check_resumed(straight, method, kill_at, folder) -> None:
    output, results = straight(method)
    resumed = trainer_of(callbacks_of(method), folder)
    resumed.model.classifier.weight.data.zero_()  # the weights have to come from the checkpoint
    resumed.train(resume_from_checkpoint=str(output / f"checkpoint-{kill_at}"))
    assert_same(results_of(resumed), results)
    assert_same(tensors_of(folder / LAST), tensors_of(output / LAST))


@pytest.mark.parametrize(("method", "kill_at"), QUICK)
def test_resumed_equals_straight(straight, tmp_path, method, kill_at) -> None:
    check_resumed(straight, method, kill_at, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kill_at"), OTHERS)
def test_resumed_equals_straight_at_every_other_step(straight, tmp_path, method, kill_at) -> None:
    check_resumed(straight, method, kill_at, tmp_path)


class KilledAtTheEnd(TrainerCallback):
    def on_train_end(self, *_, **__) -> None:
        raise PowerCutError


def test_a_run_killed_after_its_last_checkpoint_ends_as_if_it_had_not_been(tmp_path) -> None:
    """The run ends inside an epoch, where the Trainer would do one step more; the learning rate never is 0."""
    args = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    straight = trainer_of(callbacks_of("all"), tmp_path / "straight", **args)
    straight.train()
    killed = trainer_of([KilledAtTheEnd(), *callbacks_of("all")], tmp_path / "killed", **args)
    with pytest.raises(PowerCutError):
        killed.train()
    resumed = trainer_of(callbacks_of("all"), tmp_path / "killed", **args)
    resumed.model.classifier.weight.data.zero_()
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "killed"))
    assert resumed.state.global_step == straight.state.global_step == NUM_STEPS
    assert NUM_STEPS % STEPS_PER_EPOCH != 0
    assert_same(results_of(resumed), results_of(straight))
    assert_same(shrink(resumed).state_dict(), shrink(straight).state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_the_plain_models_keys_and_our_two_files(straight, tmp_path, method) -> None:
    """Law 4."""
    trainer_of([], tmp_path, max_steps=1).train()
    plain = tmp_path / "checkpoint-1"
    for folder in (straight(method)[0] / "checkpoint-1", straight(method)[0] / LAST):
        assert {path.name for path in folder.iterdir()} - {path.name for path in plain.iterdir()} == {
            JSON_FILE,
            TENSOR_FILE,
        }
        with safe_open(folder / "model.safetensors", "pt") as ours, safe_open(plain / "model.safetensors", "pt") as its:
            assert set(ours.keys()) == set(its.keys())


def adapted():
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], lora_dropout=0.1)
    return get_peft_model(tiny_models.bert(), lora)


def test_adapters_resume_from_their_checkpoints(tmp_path) -> None:
    """These hold the adapters alone."""
    first = trainer_of([distillation()], tmp_path / "a", model=adapted())
    first.train()
    cut = tmp_path / "a" / "checkpoint-3"
    assert (cut / "adapter_model.safetensors").is_file() and not (cut / "model.safetensors").exists()
    second = trainer_of([distillation()], tmp_path / "b", model=adapted())
    second.train(resume_from_checkpoint=str(cut))
    assert_same(results_of(second), results_of(first))
    (tmp_path / "a" / LAST / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.warns(UserWarning, match=r"checkpoint-10 is passed over: .*adapter_model.safetensors changed"):
        assert last_complete_checkpoint(tmp_path / "a") == str(tmp_path / "a" / "checkpoint-9")


SCORES = {2: 0.1, 4: 0.2, 6: 0.9, 8: 0.3, 10: 0.4}


def choosing(output_dir, **args):
    """A run that goes back to step 6, the best."""
    callbacks = [pruning(begin=1, end=4), distillation(), quantization(begin=1)]
    trainer = trainer_of(
        callbacks,
        output_dir,
        **{
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "score",
            **args,
        },
    )
    trainer.compute_metrics = lambda _: {"score": SCORES[trainer.state.global_step]}
    return trainer


@pytest.mark.parametrize("kill_at", [4, 8])
def test_the_best_checkpoint_from_before_or_after_the_resume_is_found_and_kept(tmp_path, kill_at) -> None:
    straight = choosing(tmp_path / "run", save_total_limit=2)
    straight.train()
    first = choosing(tmp_path / "cut", save_total_limit=2)
    first.add_callback(CutAfterSave(kill_at))
    with pytest.raises(PowerCutError):
        first.train()
    resumed = choosing(tmp_path / "cut", save_total_limit=2)
    resumed.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "cut"))
    assert resumed.state.best_global_step == 6
    assert_same(results_of(resumed), results_of(straight))
    for output in ("run", "cut"):
        assert sorted(path.name for path in (tmp_path / output).iterdir()) == [LAST, "checkpoint-6"]


def test_older_checkpoints_go_only_once_the_new_one_is_complete(tmp_path, monkeypatch) -> None:
    """With save_total_limit=1 a run killed right after the deletion has nothing else to resume from."""
    complete = []
    rotate = transformers.trainer.rotate_checkpoints

    def watch(output_dir, **kwargs):
        complete.append(last_complete_checkpoint(output_dir))
        rotate(output_dir=output_dir, **kwargs)

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", watch)
    trainer = trainer_of(callbacks_of("all"), tmp_path, save_total_limit=1, save_steps=5)
    trainer.train()
    assert complete == [str(tmp_path / "checkpoint-5"), str(tmp_path / LAST)]
    assert [path.name for path in tmp_path.iterdir()] == [LAST]
    assert "save_to_json" not in vars(trainer.state)


def test_the_trainers_own_state_file_elsewhere_draws_none_of_ours(tmp_path) -> None:
    trainer = trainer_of(callbacks_of("all"), tmp_path, save_strategy="no")
    trainer.add_callback(AtSave(lambda step: trainer.save_state()))
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"trainer_state.json"}


def test_a_checkpoint_without_optimizer_is_refused(tmp_path) -> None:
    """The plain Trainer goes on from it with a fresh optimizer and schedule, and says nothing."""
    outcomes = []
    for resume in (None, str(tmp_path / "plain" / "checkpoint-3")):
        plain = trainer_of([], tmp_path / "plain", save_only_model=True)
        plain.train(resume_from_checkpoint=resume)
        outcomes.append(plain.model.state_dict())
    assert not all(torch.equal(a, b) for a, b in zip(*(each.values() for each in outcomes), strict=True))

    output = tmp_path / "ours"
    trainer_of(callbacks_of("all"), output, save_only_model=True, save_steps=3, save_total_limit=1).train()
    with pytest.warns(UserWarning, match=r"checkpoint-10 is passed over: .*holds no optimizer state"):
        assert last_complete_checkpoint(output) is None
    steps = []
    resumed = trainer_of([*callbacks_of("all"), AtSave(steps.append)], output, max_steps=NUM_STEPS + 2)
    with pytest.raises(TrainingError, match=r"checkpoint-10: holds no optimizer state, as with save_only_model=True"):
        resumed.train(resume_from_checkpoint=str(output / LAST))
    assert steps == []


def test_the_best_checkpoint_needs_no_optimizer(tmp_path) -> None:
    results = []
    for only_model in (False, True):
        trainer = choosing(tmp_path / str(only_model), save_only_model=only_model)
        trainer.train()
        results.append(results_of(trainer))
    assert_same(*results)


def newer_version(folder) -> None:
    path = folder / JSON_FILE
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2', 1))


REFUSALS = {
    "no state": (lambda: callbacks_of("all"), lambda folder: (folder / JSON_FILE).unlink(), {}, "no hf_compress_state"),
    "newer version": (lambda: callbacks_of("all"), newer_version, {}, "schema_version is 2; this version"),
    "other pruning": (
        lambda: [pruning(structures={"heads": 0.25}), distillation(), quantization()],
        None,
        {},
        r"pruning config differs.*structures: .*'heads': 0\.5.*'heads': 0\.25",
    ),
    "other criterion": (
        lambda: [pruning("l2"), distillation(), quantization()], None, {}, "criterion: 'taylor' in the checkpoint, 'l2'"
    ),
    "other distillation": (
        lambda: [pruning(), distillation(alpha=0.9), quantization()], None, {}, r"alpha: 0\.5 in the checkpoint, 0\.9"
    ),
    "other teacher": (
        lambda: [pruning(), distillation(tiny_models.bert(hidden_size=48)), quantization()], None, {}, "another teacher"
    ),
    "other quantization": (
        lambda: [pruning(), distillation(), quantization(exclude=("pooler",))], None, {}, "quantization config differs"
    ),
    "one callback less": (lambda: [pruning(), quantization()], None, {}, r"callbacks for \['distillation', 'pruning"),
    "other model": (
        lambda: callbacks_of("all"), None, {"model": lambda: tiny_models.bert(num_hidden_layers=1)}, "parameter group"
    ),
    "other sizes": (
        lambda: callbacks_of("all"), None, {"model": lambda: tiny_models.bert(intermediate_size=40)}, "size mismatch"
    ),
}  # fmt: skip
"""Callbacks, what is done to the checkpoint, other arguments, and the message."""


@pytest.mark.parametrize("name", REFUSALS)
def test_a_checkpoint_that_does_not_fit_is_refused_before_any_step(straight, tmp_path, name) -> None:
    """What the model's or optimizer's own loading refuses, it refuses first, in its own words."""
    callbacks, damage, changes, message = REFUSALS[name]
    folder = tmp_path / "checkpoint-7"
    shutil.copytree(straight("all")[0] / "checkpoint-7", folder)
    if damage is not None:
        damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    steps = []
    changes = {key: value() for key, value in changes.items()}
    trainer = trainer_of([*callbacks(), AtSave(steps.append)], tmp_path, **changes)
    with pytest.raises((TrainingError, ValueError, RuntimeError), match=message):
        trainer.train(resume_from_checkpoint=str(folder))
    assert steps == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert all(type(module).__name__ != "InstrumentedLinear" for module in trainer.model.modules())


@pytest.mark.parametrize("make", [pruning, quantization])
def test_fractions_of_a_run_of_another_length_are_refused_and_steps_are_not(tmp_path, make) -> None:
    """The window would move, and pruned units come back."""
    cut = tmp_path / "checkpoint-6"
    fractions = {"begin": 0.2, "end": 0.8} if make is pruning else {"begin": 0.3}
    trainer_of([make(**fractions)], tmp_path, save_steps=6).train()
    with pytest.raises(TrainingError, match=r"number of steps changed"):
        trainer_of([make(**fractions)], tmp_path, max_steps=20).train(resume_from_checkpoint=str(cut))
    trainer_of([make()], tmp_path, save_steps=6).train()
    longer = trainer_of([make()], tmp_path, max_steps=12)
    longer.train(resume_from_checkpoint=str(cut))
    assert longer.state.global_step == 12
