"""What feature distillation leaves alone, gives back, logs and refuses in a real Trainer."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from features_by_hand import ALPHA, config, examples, models
from torch import Tensor, nn
from training_runs import Recorder, same
from transformers import TrainerCallback
from transformers.modeling_utils import AttentionInterface
from zoo import ZOO

from hf_compress import DistillationCallback, DistillationConfig, preview
from hf_compress.callbacks.feature_terms import FeatureTerm
from hf_compress.config import FeatureConfig, Ramp
from hf_compress.errors import CompressionError
from hf_compress.instruments import attention_tap

LOG = {"logging_strategy": "steps", "logging_steps": 1}
EVERYTHING = (
    FeatureConfig(loss="hidden_mse", weight=0.5),
    FeatureConfig(loss="attention_kl", layers="dynamic"),
    FeatureConfig(loss="relations", layers="last", of=("value",), options={"relation_heads": 2}),
    FeatureConfig(loss="fsp", weight=Ramp(start=1.0, stop=0.5)),
)
ALL = DistillationConfig(alpha=ALPHA, features=EVERYTHING)


def hooks_of(*trained: nn.Module) -> int:
    """How many hooks of ours are on models; Transformers leaves its own for hidden states."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [module for model in trained for module in model.modules()]
    hooks = [hook for module in modules for kind in kinds for hook in getattr(module, kind).values()]
    return sum(getattr(hook, "func", hook).__module__.startswith("hf_compress") for hook in hooks)


@pytest.fixture(autouse=True)
def _no_attention_was_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    # Quantized attention keeps its way in for good; tests that ran before in this process may have made some.
    monkeypatch.setattr(attention_tap, "_changing", [])
    attention_tap.AttentionWatch(set(), lambda *_: None).close()


def check_nothing_left(*trained: nn.Module) -> None:
    assert hooks_of(*trained) == 0
    assert AttentionInterface.get_interface is not attention_tap._get_interface
    assert not attention_tap._open


def run(make_trainer: Any, student: Any, teacher: Any, *more: Any, settings: Any = ALL, **args: Any) -> Any:
    trainer = make_trainer(student, examples("bert"), [DistillationCallback(settings, teacher), *more], **args)
    trainer.train()
    return trainer


def test_evaluation_and_prediction_are_those_of_the_plain_model(make_trainer: Any) -> None:
    student, teacher = models("bert")
    outputs = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            batch = {name: each.unsqueeze(0) for name, each in examples("bert")[0].items()}
            for training in (False, True):
                with torch.no_grad():
                    outputs.append(model.train(training)(**batch))
            plain = copy.deepcopy(model)
            assert hooks_of(plain) == 2  # those that mix the loss
            assert torch.equal(plain.eval()(**batch).logits, outputs[-2].logits)

    args = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    trainer = run(make_trainer, student, teacher, Look(), **args)
    assert all(set(each) == {"loss", "logits"} for each in outputs)
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    again = make_trainer(student, examples("bert"), per_device_eval_batch_size=8)
    assert again.evaluate()["eval_loss"] == logged[-1]
    assert (trainer.predict(examples("bert")).predictions == again.predict(examples("bert")).predictions).all()


def test_the_run_is_the_plain_one_where_features_weigh_nothing_to_speak_of(make_trainer: Any) -> None:
    """Watching draws no random numbers: dropout falls where it would."""
    ends = []
    for callbacks in (True, False):
        student, teacher = models("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
        settings = DistillationConfig(alpha=1e-30, loss=None, features=EVERYTHING)
        chosen = [DistillationCallback(settings, teacher)] if callbacks else []
        make_trainer(student, examples("bert"), chosen).train()
        ends.append(student.state_dict())
    assert same(*ends)


class StopItError(Exception):
    pass


@pytest.mark.parametrize("error", [StopItError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["student", "teacher", "first batch", "step"])
def test_nothing_is_left_after_an_interruption(make_trainer: Any, error: type[BaseException], where: str) -> None:
    student, teacher = models("bert")
    calls = []

    def fail(*_: Any) -> None:
        calls.append(torch.is_grad_enabled())
        if len(calls) > (0 if where == "first batch" else 3):
            raise error

    class Fails(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise error

    broken = (teacher if where == "teacher" else student).bert.encoder.layer[1].output
    handle = broken.register_forward_hook(fail)
    with pytest.raises(error):
        run(make_trainer, student, teacher, *([Fails()] if where == "step" else []))
    handle.remove()
    check_nothing_left(student, teacher)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_comes_back_as_it_was(make_trainer: Any) -> None:
    student, teacher = models("bert")
    teacher.bert.encoder.train()
    teacher.classifier.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    modes = [module.training for module in teacher.modules()]
    flags = [parameter.requires_grad for parameter in teacher.parameters()]
    run(make_trainer, student, teacher)
    check_nothing_left(student, teacher)
    assert modes == [module.training for module in teacher.modules()]
    assert flags == [parameter.requires_grad for parameter in teacher.parameters()]
    assert same(before, teacher.state_dict())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_features_die_with_their_step(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    layers = FeatureTerm._layers

    def noted(self: Any, *args: Any) -> Any:
        found = layers(self, *args)
        alive.extend(weakref.ref(each) for each in found if each is not None)
        return found

    numbers: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            numbers.append(sum(each() is not None for each in alive))

    monkeypatch.setattr(FeatureTerm, "_layers", noted)
    for options in ({}, {"label_smoothing_factor": 0.1}):
        alive.clear()
        numbers.clear()
        run(make_trainer, *models("bert"), Count(), max_steps=5, **options)
        assert len(alive) > 20
        assert numbers == [0] * 5


@pytest.mark.parametrize("source", ["self", "unmasked", "several"])
def test_every_kind_of_teacher_shows_features(make_trainer: Any, source: str) -> None:
    student, teacher = models("bert", hidden_dropout_prob=0.3)
    given = [teacher, models("bert", teacher={"hidden_size": 48})[1]] if source == "several" else source
    recorder = Recorder()
    trainer = run(make_trainer, student, given, recorder, **LOG)
    check_nothing_left(student, teacher)
    for entry in trainer.state.log_history[:-1]:
        for name in ("logits", "hidden_mse", "attention_kl", "relations", "fsp"):
            assert 0 < entry[f"{name}_loss"] < 100


def test_several_teachers_demand_the_mean(make_trainer: Any) -> None:
    student, first = models("bert")
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.7)
    args = {"max_steps": 1, "per_device_train_batch_size": 8, **LOG}
    found = [
        run(make_trainer, copy.deepcopy(student), each, settings=config("hidden_mse"), **args).state.log_history[0]
        for each in (first, second, [first, second])
    ]
    losses = [entry["distillation_loss"] for entry in found]
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)


def test_logs_and_preview_show_each_part(make_trainer: Any) -> None:
    """Ramps have their value of the step; a name that comes twice is numbered."""
    student, teacher = models("bert")
    ramp = Ramp(start=1.0, stop=3.0, begin=0, end=4)
    features = (
        FeatureConfig(loss="hidden_mse", weight=ramp),
        FeatureConfig(loss="hidden_mse", layers="last", weight=0.25),
        FeatureConfig(loss="attention_kl", layers={0: 0}),
    )
    settings = DistillationConfig(alpha=ALPHA, features=features)
    data = examples("bert")
    parts = by_hand(student, teacher, data)
    args = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 0.0, **LOG}
    trainer = make_trainer(student, data, [DistillationCallback(settings, teacher)], **args)
    facts = preview(trainer).sections["distillation"]
    trainer.train()
    check_nothing_left(student, teacher)
    logged = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    for step, entry in enumerate(logged):
        expected = {
            "hidden_mse_0_loss": (1 + 2 * step / 3) * parts["hidden_mse"],
            "hidden_mse_1_loss": 0.25 * parts["last"],
            "attention_kl_loss": parts["attention_kl"],
            "logits_loss": parts["logits"],
        }
        for name, value in expected.items():
            assert entry[name] == pytest.approx(value, rel=1e-4), name
        assert entry["distillation_loss"] == pytest.approx(sum(expected.values()), rel=1e-4)
        mixed = (1 - ALPHA) * entry["task_loss"] + ALPHA * entry["distillation_loss"]
        assert entry["loss"] == pytest.approx(mixed, rel=1e-4)
        if step == 0:
            for name, value in expected.items():
                fact = f"{name.removesuffix('_loss')} loss of the first batch"
                assert facts[fact] == pytest.approx(value, rel=1e-4)


def by_hand(student: Any, teacher: Any, data: Any) -> dict[str, float]:
    batch = {name: torch.stack([example[name] for example in data]) for name in data[0]}
    with torch.no_grad():
        own, theirs = (
            each.eval()(**batch, output_hidden_states=True, output_attentions=True) for each in (student, teacher)
        )
    student.train()
    keep = batch["attention_mask"].bool()

    def mean(function: Callable[[Tensor, Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
        return float(sum(function(x, y, k) for x, y, k in zip(a, b, keep, strict=True)) / len(keep))

    def square(a: Tensor, b: Tensor, k: Tensor) -> Tensor:
        return (a[k] - b[k]).square().mean()

    def divergence(a: Tensor, b: Tensor, k: Tensor) -> Tensor:
        p, q = b[:, k][:, :, k], a[:, k][:, :, k]
        return (p * (p / q).log()).sum(-1).mean()

    p, q = ((each.logits / 2).softmax(-1) for each in (theirs, own))
    squares = [mean(square, a, b) for a, b in zip(own.hidden_states[1:], theirs.hidden_states[1:], strict=True)]
    return {
        "hidden_mse": sum(squares) / 2,
        "last": squares[-1],
        "attention_kl": mean(divergence, own.attentions[0], theirs.attentions[0]),
        "logits": 4 * float((p * (p / q).log()).sum(-1).mean()),
    }


def other(model: Any, **changes: Any) -> Any:
    """A model of another class with the student's labels and vocabulary."""
    return ZOO[model](num_labels=3, **changes).eval()


Feature = dict[str, Any]
REFUSED: dict[str, tuple[Feature, Callable[[], Any], dict[str, Any], str]] = {
    "depths differ": (
        {"loss": "hidden_mse"},
        lambda: models("bert", teacher={"num_hidden_layers": 3})[1],
        {},
        "the student has 2 layers, the teacher 3; it needs equal depths. Use 'uniform'",
    ),
    "no such layer": (
        {"loss": "hidden_mse", "layers": {0: 5}},
        lambda: models("bert")[1],
        {},
        "the teacher has 2 layers, and no layer 5; allowed: ints from -2 to 1",
    ),
    "no such candidate": (
        {"loss": "hidden_mse", "layers": "dynamic", "candidates": {0: [7]}},
        lambda: models("bert")[1],
        {},
        "the teacher has 2 layers, and no layer 7",
    ),
    "no such student layer": (
        {"loss": "gram", "layers": "dynamic", "candidates": {4: [1]}},
        lambda: models("bert")[1],
        {},
        "the student has 2 layers, and no layer 4",
    ),
    "no later candidate": (
        {"loss": "gram", "layers": "dynamic", "candidates": "later"},
        lambda: models("bert", teacher={"num_hidden_layers": 1})[1],
        {},
        r"student layers \[1\] have no candidate among 1 teacher layers",
    ),
    "relation heads": (
        {"loss": "relations", "options": {"relation_heads": 5}},
        lambda: models("bert")[1],
        {},
        "relation_heads is 5, but the student is 32 and the teacher 32 wide",
    ),
    "heads of a wider teacher": (
        {"loss": "relations"},
        lambda: models("bert", teacher={"hidden_size": 36, "num_attention_heads": 6})[1],
        {},
        "relation_heads is 6, but the student is 32 and the teacher 36 wide.*largest that does is 4",
    ),
    "missing stack": (
        {"loss": "hidden_mse", "stack": "decoder"},
        lambda: models("bert")[1],
        {},
        r"the student has no decoder .* it has \['encoder'\]. Set FeatureConfig.stack",
    ),
    "teacher without attention of that kind": (
        {"loss": "attention_kl"},
        lambda: other("mpnet"),
        {},
        "MPNet.* has no attention, or computes it in code of its own",
    ),
    "ramp beyond the run": (
        {"loss": "hidden_mse", "weight": Ramp(start=1.0, stop=2.0, begin=10, end=20)},
        lambda: models("bert")[1],
        {},
        "begin=10 and end=20, which are steps 10 and 20; the run has 4 optimizer steps",
    ),
    "reentrant checkpointing": (
        {"loss": "attention_kl"},
        lambda: models("bert")[1],
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        "under activation checkpointing with use_reentrant=True it would get no gradient. Set",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_the_first_step(make_trainer: Any, case: str) -> None:
    feature, teacher, args, message = REFUSED[case]
    student, given = models("bert")[0], teacher()
    before, recorder = copy.deepcopy(student.state_dict()), Recorder()
    calls: list[bool] = []
    settings = (
        config(**feature) if "weight" not in feature else DistillationConfig(features=(FeatureConfig(**feature),))
    )
    callback = DistillationCallback(settings, given)
    trainer = make_trainer(student, examples("bert"), [callback, Begins(calls), recorder], **args)
    with pytest.raises(CompressionError, match=message):
        trainer.train()
    assert not calls
    assert not recorder.gradients
    check_nothing_left(student, given)
    assert same(before, student.state_dict())


class Begins(TrainerCallback):
    def __init__(self, calls: list[bool]) -> None:
        self.calls = calls

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(True)


def test_fused_attention_is_refused_before_the_first_step(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel shows what attends to what; any other name than those of eager and sdpa stands for one."""
    student, teacher = models("bert")
    known = AttentionInterface._global_mapping
    monkeypatch.setitem(known, "fused", known["sdpa"])
    teacher.config._attn_implementation = "fused"
    calls: list[bool] = []
    callback = DistillationCallback(config("attention_kl"), teacher)
    trainer = make_trainer(student, examples("bert"), [callback, Begins(calls)])
    with pytest.raises(CompressionError, match=r"computes attention by 'fused'.*attn_implementation='sdpa' or 'eager'"):
        trainer.train()
    assert not calls
    check_nothing_left(student, teacher)


def test_where_only_features_are_compared_the_teacher_needs_no_head(
    tiny_bert, classification_data, make_trainer
) -> None:
    """A base model, or one of another task, has the same features as the model with the student's head."""
    found = []
    config = DistillationConfig(loss=None, features=[{"loss": "hidden_mse"}])
    whole = tiny_bert(seed=1)
    other = tiny_bert(seed=1, num_labels=7)
    other.bert.load_state_dict(whole.bert.state_dict())
    for teacher in (whole, whole.bert, other):
        student = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        make_trainer(student, classification_data(16), [DistillationCallback(config, teacher)]).train()
        found.append(student.state_dict())
    for weights in found[1:]:
        assert all(torch.equal(weights[name], value) for name, value in found[0].items())
