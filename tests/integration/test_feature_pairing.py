"""Which layers learn from which in a real Trainer: dynamic pairs, pruned layers, layers that are dropped at random."""

import copy
import itertools
from typing import Any

import pytest
import torch
from features_by_hand import ALPHA, WEIGHT, attention_kl, config, examples, hidden_mse, models
from torch import Tensor
from training_runs import StopAt, same, slow_unless
from transformers import TrainerCallback, Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from hf_compress import DistillationCallback, DistillationConfig, PruningCallback, PruningConfig, shrink
from hf_compress.config import FeatureConfig
from hf_compress.errors import TrainingError

DROPPED = [("same", "hidden_mse", None), ("last", "attention_kl", "auto"), ("dynamic", "attention_kl", None)]
"""The cases of LayerDrop that the default run takes."""

LOG = {"logging_strategy": "steps", "logging_steps": 1}
INFINITE = float("inf")

DYNAMIC: dict[str, dict[str, Any]] = {
    "all": {},
    "later": {"candidates": "later"},
    "ordered": {"ordered": True},
    "chosen by the teacher": {"chosen_by": "teacher"},
    "ordered, chosen by the teacher": {"chosen_by": "teacher", "ordered": True},
    "candidates": {"candidates": {0: [3, 2], -1: [0]}},
    "some teacher layers": {"teacher_layers": (1, -1), "chosen_by": "teacher"},
}


def batch_of(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([example[name] for example in data]) for name in data[0]}


def costs_of(student: Any, teacher: Any, batch: dict[str, Tensor]) -> list[list[float]]:
    """What every pair of layers costs, the mean over examples."""
    keep = batch["attention_mask"].bool()
    with torch.no_grad():
        own, theirs = (model(**batch, output_hidden_states=True).hidden_states[1:] for model in (student, teacher))
    return [
        [sum(float(hidden_mse(a[n][keep[n]], b[n][keep[n]])) for n in range(len(keep))) / len(keep) for b in theirs]
        for a in own
    ]


def least(costs: list[list[float]], name: str) -> float:
    """The least mean cost over all ways to choose, one by one."""
    settings = DYNAMIC[name]
    allowed = [[1.0] * 4 for _ in costs]
    if name == "later":
        allowed = [[1.0 if j >= i else INFINITE for j in range(4)] for i in range(len(costs))]
    if name == "candidates":
        allowed = [[INFINITE, INFINITE, 1, 1], [INFINITE] * 4, [1, INFINITE, INFINITE, INFINITE]]
    if name == "some teacher layers":
        allowed = [[INFINITE, 1, INFINITE, 1] for _ in costs]
    table = [[c * a for c, a in zip(*rows, strict=True)] for rows in zip(costs, allowed, strict=True)]
    if settings.get("chosen_by") == "teacher":
        table = [list(column) for column in zip(*table, strict=True)]
    table = [row for row in table if min(row) < INFINITE]
    choices = [
        choice
        for choice in itertools.product(range(len(table[0])), repeat=len(table))
        if not settings.get("ordered") or list(choice) == sorted(choice)
    ]
    return min(sum(row[j] for row, j in zip(table, choice, strict=True)) / len(table) for choice in choices)


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_pairs_cost_least(make_trainer: Any, name: str) -> None:
    student, teacher = models("bert", teacher={"num_hidden_layers": 4}, num_hidden_layers=3)
    data = examples("bert")
    expected = least(costs_of(student, teacher.eval(), batch_of(data)), name)
    callback = DistillationCallback(config("hidden_mse", layers="dynamic", **DYNAMIC[name]), teacher)
    trainer = make_trainer(student, data, [callback], max_steps=1, per_device_train_batch_size=8, **LOG)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["distillation_loss"] == pytest.approx(WEIGHT * expected, rel=1e-4)
    assert entry["loss"] == pytest.approx((1 - ALPHA) * entry["task_loss"] + ALPHA * entry["distillation_loss"])


def layer_pruning(**changes: Any) -> PruningCallback:
    settings = {"structures": {"layers": 0.5}, "begin": 1, "end": 3, "update_every": 1, "criterion": "l2", **changes}
    return PruningCallback(PruningConfig(**settings))


gates_stay = pytest.mark.filterwarnings("ignore:PruningCallback. gates stay:UserWarning")


@gates_stay
@pytest.mark.parametrize("layers", ["same", "dynamic"])
def test_pruned_layers_take_no_part(make_trainer: Any, layers: str) -> None:
    """The loss is the mean over those that are left."""
    student, teacher = models("bert", num_hidden_layers=4)
    data, pruning = examples("bert"), layer_pruning()
    callback = DistillationCallback(config("hidden_mse", layers=layers), teacher)
    args = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 0.0, **LOG}
    trainer = make_trainer(student, data, [pruning, callback], **args)
    costs = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            costs.append(costs_of(trainer.model.eval(), teacher, batch_of(data)))
            trainer.model.train()

    trainer.add_callback(Watch())
    trainer.train()
    kept = [int(mask.sum()) for mask in pruning.masks().values()]
    assert kept == [2]
    (mask,) = pruning.masks().values()
    own = [i for i in range(4) if mask[i]]
    best = [costs[-1][i][i] if layers == "same" else min(costs[-1][i]) for i in own]
    logged = [entry["distillation_loss"] for entry in trainer.state.log_history if "distillation_loss" in entry]
    assert logged[-1] == pytest.approx(WEIGHT * sum(best) / len(best), rel=1e-4)
    assert logged[-1] != pytest.approx(logged[0], rel=1e-3)


@pytest.mark.parametrize("layers", [{0: 0, 1: 1}, "dynamic"])
def test_a_run_that_prunes_all_paired_layers_says_so(make_trainer: Any, layers: Any) -> None:
    student, teacher = models("bert", num_hidden_layers=4)
    with torch.no_grad():
        for layer in student.bert.encoder.layer[:2]:  # the least important ones
            for parameter in layer.parameters():
                parameter.mul_(1e-3)
    extra = {"candidates": {0: [0], 1: [1]}} if layers == "dynamic" else {}
    callback = DistillationCallback(config("hidden_mse", layers=layers, **extra), teacher)
    trainer = make_trainer(student, examples("bert"), [layer_pruning(), callback], max_steps=6, learning_rate=0.0)
    with pytest.raises(TrainingError, match="'hidden_mse' has no pair of layers left in the encoder"):
        trainer.train()


def speech(**changes: Any) -> Any:
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    more = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    shape = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    torch.manual_seed(0)
    every = {**settings, **more, **shape, "num_labels": 2, "mask_time_length": 2, **changes}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**every))


@pytest.mark.parametrize(
    ("layers", "loss", "logits"),
    [
        slow_unless(case in DROPPED, *case, name=str(case))
        for case in itertools.product(["same", "last", "dynamic"], ["hidden_mse", "attention_kl"], ["auto", None])
    ],
)
def test_layers_dropped_at_random_take_no_part_in_that_step(
    make_trainer: Any, layers: str, loss: str, logits: str | None
) -> None:
    """LayerDrop: in some steps no layer runs, and the task goes on alone."""
    rows = [{"input_values": torch.randn(400), "labels": i % 2} for i in range(8)]
    settings = DistillationConfig(alpha=0.5, loss=logits, features=(FeatureConfig(loss=loss, layers=layers),))
    callback = DistillationCallback(settings, speech(layerdrop=0.0).eval())
    args = {"max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **LOG}
    trainer = make_trainer(speech(layerdrop=0.5), rows, [callback], **args)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "distillation_loss" in entry]
    assert len(logged) == 12
    for entry in logged:
        mixed = 0.5 * entry["task_loss"] + 0.5 * entry["distillation_loss"]
        assert entry["loss"] == pytest.approx(mixed, rel=1e-4)
    name = "distillation_loss" if logits is None else f"{loss}_loss"
    nothing = [entry[name] == 0 for entry in logged]
    assert any(nothing) and not all(nothing)


UNEVEN = [
    {"loss": "hidden_mse", "layers": "dynamic"},
    {"loss": "attention_kl", "layers": "dynamic"},
    {"loss": "relations", "layers": "dynamic", "options": {"relation_heads": 2}, "candidates": "all"},
    {"loss": "gram", "layers": "uniform"},
]


@pytest.fixture
def shrunk(make_trainer: Any) -> tuple[Any, Any]:
    """A model with fewer layers, less width and unequal numbers of heads, and the dense one."""
    dense = models("bert", num_hidden_layers=4)[0]
    structures = {"layers": 0.25, "hidden": 0.25, "heads": 0.5}
    pruning = layer_pruning(structures=structures, allocation="global", criterion="taylor")
    trainer = make_trainer(copy.deepcopy(dense), examples("bert"), [pruning], max_steps=4)
    trainer.train()
    return shrink(trainer), dense.eval()


@pytest.mark.slow
@gates_stay
def test_a_shrunk_model_learns_from_the_dense_one(make_trainer: Any, shrunk: Any) -> None:
    student, teacher = shrunk
    assert student.config.num_hidden_layers == 3
    assert student.get_input_embeddings().weight.shape[1] == 24, student
    heads = {layer.attention.self.query.out_features for layer in student.bert.encoder.layer}
    assert len(heads) > 1
    features = tuple(FeatureConfig(**each) for each in UNEVEN)
    callback = DistillationCallback(DistillationConfig(alpha=0.9, features=features), teacher)
    args = {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 3e-3, **LOG}
    trainer = make_trainer(student, examples("bert"), [callback], **args)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "distillation_loss" in entry]
    for name in ("logits", *(each["loss"] for each in UNEVEN)):
        assert logged[-1][f"{name}_loss"] < 0.7 * logged[0][f"{name}_loss"], name


@gates_stay
def test_dynamic_pairs_of_unequal_layers_cost_least(make_trainer: Any, shrunk: Any) -> None:
    """Layers whose maps have unequal numbers of heads cannot be stacked."""
    student, teacher = shrunk
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    data = examples("bert")
    batch = batch_of(data)
    keep = batch["attention_mask"].bool()
    maps = [model.eval()(**batch, output_attentions=True).attentions for model in (student, teacher)]
    best = [min(sum(mean_kl(a[n], b[n], keep[n]) for n in range(8)) / 8 for b in maps[1]) for a in maps[0]]
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    callback = DistillationCallback(config("attention_kl", layers="dynamic"), teacher)
    trainer = make_trainer(student, data, [callback], max_steps=1, per_device_train_batch_size=8, **LOG)
    trainer.train()
    expected = WEIGHT * sum(best) / len(best)
    assert trainer.state.log_history[0]["distillation_loss"] == pytest.approx(expected, rel=1e-4)


def mean_kl(student: Tensor, teacher: Tensor, keep: Tensor) -> float:
    own, theirs = (each.detach()[:, keep][:, :, keep] for each in (student, teacher))
    if len(own) != len(theirs):
        own, theirs = own.mean(0, keepdim=True), theirs.mean(0, keepdim=True)
    return float(attention_kl(own, theirs))


@gates_stay
@pytest.mark.parametrize(
    "layers", [slow_unless(True, "same", name="same"), slow_unless(False, "dynamic", name="dynamic")]
)
def test_a_resumed_run_knows_at_once_which_layers_are_pruned(make_trainer: Any, tmp_path: Any, layers: str) -> None:
    """Law 5, bit for bit: the masks come back after the first batch was tried."""
    ends = []
    for stops in ((), (4,)):
        output = str(tmp_path / f"{len(stops)}")
        for stop in (*stops, None):
            student, teacher = models("bert", num_hidden_layers=4)
            callbacks = [DistillationCallback(config("hidden_mse", layers=layers), teacher), layer_pruning()]
            args = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "output_dir": output}
            trainer = make_trainer(student, examples("bert"), [*callbacks, StopAt(stop)], **args)
            trainer.train(resume_from_checkpoint=bool(stops) and stop is None)
        ends.append(student.state_dict())
    assert same(*ends)
