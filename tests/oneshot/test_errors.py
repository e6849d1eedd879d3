"""What cannot be done is said, and leaves the model as it was."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
from oneshot_models import Snapshot, batches, prune, trained
from torch import nn

from hf_compress import ConfigError, GraphError, PruningCallback, PruningConfig, ShrinkError, TargetError, prune_oneshot
from hf_compress.oneshot import obs, weights
from hf_compress.oneshot.settings import CRITERIA

HEADS = PruningConfig(structures={"heads": 0.5})
NEED_BATCHES = ["wanda", "obs", "kwon", "taylor", "fisher", "block_influence"]


def structures_for(criterion: str) -> dict[str, float]:
    return {"heads": 0.5, "ffn": 0.5} if "heads" in CRITERIA[criterion].structures else {"layers": 0.5}


def broken_loader() -> Iterator[Any]:
    yield from batches(1)
    raise OSError("the disk is gone")


GOOD = batches(2)
WITHOUT_LABELS = [{key: value for key, value in GOOD[1].items() if key != "labels"}]


@pytest.mark.parametrize("criterion", NEED_BATCHES)
@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ConfigError, "gave no batch"),
        ([GOOD[0], [1, 2]], ConfigError, "batch 1 of the dataloader is a list"),
        ([GOOD[0], {"input_ids": [[1]]}], ConfigError, "batch 1"),
        ([GOOD[0], {**GOOD[1], "token_type_ids": torch.ones(3, 3).long()}], TargetError, "batch 1 .*token_type_ids"),
        ([GOOD[0], {**GOOD[1], "input_ids": torch.full((8, 8), 999)}], TargetError, "failed on batch 1"),
    ],
    ids=["empty", "list", "no tensors", "shapes", "bad ids"],
)
def test_bad_batches(criterion: str, data: Any, error: type[Exception], message: str) -> None:
    model = trained("bert").train()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        prune(model, data, HEADS, structures=structures_for(criterion), criterion=criterion)
    before.check()


@pytest.mark.parametrize(("criterion", "structure"), [("wanda", "ffn"), ("wanda", "weights"), ("obs", "ffn")])
def test_padding_alone_says_nothing(criterion: str, structure: str) -> None:
    model = trained("bert")
    before = Snapshot(model)
    data = [{**each, "attention_mask": torch.zeros_like(each["input_ids"])} for each in GOOD]
    settings = {"structures": {structure: 0.5}, "criterion": criterion, "allocation": "per_layer"}
    with pytest.raises(TargetError, match="attention_mask is 0 everywhere"):
        prune(model, data, HEADS, **settings)
    before.check()


@pytest.mark.parametrize("criterion", NEED_BATCHES)
def test_a_loader_that_fails(criterion: str) -> None:
    model = trained("bert").train()
    before = Snapshot(model)
    with pytest.raises(OSError, match="disk"):
        prune(model, broken_loader(), HEADS, structures=structures_for(criterion), criterion=criterion)
    before.check()


@pytest.mark.parametrize(("loader", "kind"), [(None, "NoneType"), (3, "int")])
def test_a_loader_that_is_none(loader: Any, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"the dataloader is a {kind}; allowed: an iterable of batches"):
        prune(trained("bert"), loader, HEADS)


FC = "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"allocation": "per_layer"}])
@pytest.mark.parametrize(
    ("structure", "criterion", "message"),
    [
        ("ffn", "l2", r"1 of the 64 scores of 'bert\.encoder\.layer\.1\.ffn'"),
        ("ffn", "wanda", r"1 of the 64 scores of 'bert\.encoder\.layer\.1\.ffn'"),
        ("ffn", "obs", rf"weights of '{FC}', which read units of 'bert\.encoder\.layer\.1\.ffn'"),
        ("weights", "level", f"1 of the 2,048 weights of '{FC}'"),
        ("weights", "wanda", f"1 of the 2,048 weights of '{FC}'"),
        ("weights", "obs", f"1 of the 2,048 weights of '{FC}'"),
    ],
)
def test_weights_that_are_not_finite(structure: str, criterion: str, message: str, settings: Any, value: float) -> None:
    model = trained("bert")
    with torch.no_grad():
        model.get_submodule(FC).weight[0, 3] = value
    before = copy.deepcopy(model.state_dict())
    if structure == "weights":
        settings = {"allocation": "per_layer"} if not settings else {"granularity": "2:4"}
    with pytest.raises(TargetError, match=f"{message} are not finite"):
        prune(model, GOOD, HEADS, structures={structure: 0.5}, criterion=criterion, **settings)
    after = model.state_dict()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


@pytest.mark.parametrize("criterion", NEED_BATCHES)
def test_activations_that_are_not_finite(criterion: str) -> None:
    model = trained("bert").train()
    # Token 19 is in the second batch alone.
    data = [{**batch, "input_ids": batch["input_ids"].clamp_max(18)} for batch in GOOD]
    data[1]["input_ids"][0, 0] = 19
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[19] = float("nan")
    embeddings = model.bert.embeddings.word_embeddings.weight.clone()
    others = {name: tensor.clone() for name, tensor in model.state_dict().items() if "word_embeddings" not in name}
    with pytest.raises(TargetError, match=r"batch 1 gives numbers .* not finite"):
        prune(model, data, HEADS, structures=structures_for(criterion), criterion=criterion)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in others.items())
    assert torch.equal(embeddings.isnan(), model.bert.embeddings.word_embeddings.weight.isnan())
    assert model.training


@pytest.mark.parametrize("criterion", ["kwon", "taylor", "fisher"])
def test_gradients_need_labels(criterion: str) -> None:
    model = trained("bert")
    before = Snapshot(model)
    with pytest.raises(TargetError, match="batch 1 gives no loss"):
        prune(model, [GOOD[0], *WITHOUT_LABELS], HEADS, criterion=criterion)
    before.check()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("structures", [{"heads": 0.5, "ffn": 0.5}, {"weights": 0.5}])
def test_what_was_changed_already_is_undone(
    structures: dict[str, float], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained("bert").train()
    before = Snapshot(model)
    module: Any = weights if "weights" in structures else obs
    name = "sparsegpt" if "weights" in structures else "without_units"
    original, changes = getattr(module, name), []

    def fails_later(*args: Any, **keywords: Any) -> Any:
        changes.append(torch.equal(model.bert.encoder.layer[0].attention.output.dense.weight, first))
        if len(changes) == 3 + 3 * ("weights" in structures):
            raise error("in the middle")
        return original(*args, **keywords)

    first = model.bert.encoder.layer[0].attention.output.dense.weight.clone()
    monkeypatch.setattr(module, name, fails_later)
    with pytest.raises(error, match="in the middle"):
        prune(
            model,
            GOOD,
            PruningConfig(structures={"heads": 0.5}, allocation="per_layer"),
            structures=structures,
            criterion="obs",
        )
    assert changes[0] and not changes[-1]  # so that there was something to undo
    before.check()


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "kwon"])
def test_a_loss_without_gradient(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("bert")
    before = Snapshot(model)
    original = type(model).forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        output = original(self, *args, **keywords)
        if output.loss is not None:
            output.loss = output.loss.detach()
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(TargetError, match=r"the loss of batch 0 does not depend on .*heads"):
        prune(model, GOOD, HEADS, criterion=criterion)
    before.check()


def test_first_sizes_that_differ_cannot_be_taken_apart() -> None:
    batch = {**GOOD[0], "position_ids": torch.arange(8)[None]}
    with pytest.raises(TargetError, match=r"batch 0 cannot be taken apart .*position_ids"):
        prune(trained("bert"), [batch], HEADS, criterion="fisher")
    assert prune(trained("bert"), [batch], HEADS, criterion="taylor").masks


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"criterion": "movement"}, "'movement' needs training; without, .*'taylor'"),
        ({"structures": {"experts": 0.5}}, "got 'experts'; allowed"),
        ({"structures": {"weights": 0.5}, "criterion": "taylor"}, "does not work on 'weights' without training"),
        ({"structures": {"weights": 0.5, "ffn": 0.5}, "criterion": "l2"}, "beside other structures"),
        ({"structures": {"weights": 0.5}, "criterion": "wanda"}, "within each output.*allowed: 'per_layer'"),
        ({"criterion": "obs", "options": {"block_size": 64}}, "no effect on heads by 'element'; allowed: 128"),
        (
            {"structures": {"weights": 0.5}, "criterion": "obs", "granularity": "row", "options": {"block_size": 64}},
            "no effect on weights by 'row'",
        ),
        ({"criterion": "l2", "seed": "a"}, "seed='a'; allowed: an int"),
        ({"criterion": "l2", "seed": 1}, "seed=1; allowed: 0 unless the criterion is 'random'"),
        ({"num_batches": 0}, "num_batches=0"),
        ({"num_batches": "2"}, "num_batches='2'; allowed: an int >= 1"),
        ({"num_batches": 1.5}, "num_batches=1.5"),
        ({"num_batches": True}, "num_batches=True"),
        ({"criterion": "l2", "options": {"damping": 0.1}}, "unknown key 'damping'"),
        ({"criterion": "obs", "options": {"damping": -1}}, "damping"),
    ],
)
def test_settings_that_do_not_go_together(keywords: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(trained("bert"), GOOD, HEADS, **keywords)


@pytest.mark.parametrize(
    "settings",
    [
        {"begin": 0.2},
        {"end": 0.9},
        {"schedule": "linear"},
        {"update_every": 5},
        {"gradients": "distillation"},
        {"rules": [{"match": ["0"], "end": 0.9}]},
    ],
)
def test_settings_of_training_have_no_effect(settings: Any) -> None:
    with pytest.raises(ConfigError, match="no effect without training"):
        prune(trained("bert"), GOOD, PruningConfig(structures={"ffn": 0.5}, **settings))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"criterion": "movement"}, r"rules\[0\]\.criterion: 'movement' needs training"),
        ({"begin": 3}, r"rules\[0\]\.begin: got 3, which has no effect without training"),
        ({"structures": {"weights": 0.5}}, "'weights' beside other structures"),
        ({"criterion": "taylor", "structures": {"weights": 0.5}}, r"rules\[0\]\.structures: 'taylor' does not work on"),
    ],
)
def test_rules_that_cannot_be_carried_out(rule: Any, message: str) -> None:
    config = PruningConfig(structures={"ffn": 0.5}, criterion="l2", rules=[{"match": ["0"], **rule}])
    with pytest.raises(ConfigError, match=message):
        prune(trained("bert"), GOOD, config)


@pytest.mark.parametrize(
    ("settings", "structures", "message"),
    [
        ({"exclude": ["nothing"]}, {"ffn": 0.5}, "matches no dimension group"),
        ({"exclude": ["ffn"]}, {"ffn": 0.5}, "has no 'ffn'"),
        ({}, {"other": 0.5}, "cannot be pruned"),
        ({}, {"hidden": 0.5}, "not through linear layers alone"),
        ({"min_units": 4}, {"heads": 0.5}, "keep at least"),
    ],
)
def test_what_the_model_cannot_give(settings: Any, structures: Any, message: str) -> None:
    config = PruningConfig(structures={"heads": 0.5}, **settings)
    with pytest.raises(TargetError, match=message):
        prune(trained("bert"), GOOD, config, structures=structures, criterion="obs")


def test_criteria_that_need_no_training_cannot_train(make_trainer: Any) -> None:
    for criterion in ("obs", "kwon"):
        config = PruningConfig(structures={"ffn": 0.5}, criterion=criterion)
        trainer = make_trainer(trained("bert"), [], [PruningCallback(config)])
        trainer.train_dataset = [{key: value[i] for key, value in GOOD[0].items()} for i in range(8)]
        with pytest.raises(ConfigError, match=f"{criterion!r} works without training; use prune_oneshot"):
            trainer.train()


def test_experts_have_no_inputs_to_update() -> None:
    with pytest.raises(TargetError, match="needs Linear or Conv1D layers"):
        prune(tiny_models.mixtral(), GOOD, HEADS, structures={"ffn": 0.5}, criterion="obs")


def test_patterns_need_inputs_that_are_a_multiple() -> None:
    config = PruningConfig(structures={"heads": 0.5})
    with pytest.raises(TargetError, match="no multiple of 5"):
        prune(trained("bert"), GOOD, config, structures={"weights": 0.8}, criterion="obs", granularity="1:5")


def test_other_models() -> None:
    with pytest.raises(TargetError, match="got Linear"):
        prune(nn.Linear(2, 2), GOOD, HEADS)  # type: ignore[arg-type]
    model = trained("bert")
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(TargetError, match="meta device"):
        prune(empty, GOOD, HEADS)
    compressed = copy.deepcopy(trained("bert"))
    compressed.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(ShrinkError, match="quantized already"):
        prune(compressed, GOOD, HEADS)
    with pytest.raises(GraphError, match="example_inputs"):
        prune(trained("bert"), GOOD, HEADS, example_inputs=[1])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pass a PruningConfig"):
        prune_oneshot(trained("bert"), GOOD, {"heads": 0.5})  # type: ignore[arg-type]
