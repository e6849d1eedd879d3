"""The pruner on models, without a Trainer: which units, what is read, what stays."""

import math

import pytest
import tiny_models
import torch
from torch import nn
from zoo import ZOO

from hf_compress import PruningConfig, PruningRule, TargetError, TrainingError, make_example_inputs
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.attach import attachment_of
from hf_compress.instruments.pruner import Pruner
from hf_compress.instruments.pruner_state import restore, state_of
from hf_compress.pruning.allocate import achieved_sparsity


def alone(mine, like):
    """The mean over a single rank."""
    return mine


def pruner_of(model, steps=6, **settings) -> Pruner:
    settings = {"begin": 1, "end": 4, "update_every": 1, **settings}
    return Pruner(model, ModelGraph(model), PruningConfig(**settings), steps)


def train(model, pruner, steps=range(6), learning_rate=0.05):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    inputs = make_example_inputs(model)
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        outputs = model(**inputs)
        outputs[0].float().square().mean().backward()
        pruner.read(step, alone, 1.0)
        optimizer.step()
        pruner.update(step + 1)


def step_of(pruner, step, mean):
    """One optimizer step, with what the ranks read put together by ``mean``."""
    pruner.model.train()
    pruner.model(**make_example_inputs(pruner.model))[0].float().square().mean().backward()
    pruner.read(step, mean, 1.0)
    pruner.update(step + 1)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(**make_example_inputs(model))[0]


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block", "2:4"])
@pytest.mark.parametrize("make", [tiny_models.bert, ZOO["gpt2"], ZOO["vit"]], ids=["bert", "gpt2", "vit"])
def test_weights_are_zero_where_they_are_pruned_in_every_granularity(granularity, make) -> None:
    model = make()
    block = {"block_size": (4, 3)} if granularity == "block" else {}
    odd = () if granularity != "2:4" else tuple(
        rf"^{name}\.weight$" for name, module in model.named_modules() if wide(module) % 4
    )  # fmt: skip
    settings = {"structures": {"weights": 0.5}, "criterion": "l2", "granularity": granularity, "exclude": odd, **block}
    pruner = pruner_of(model, **settings)
    train(model, pruner)
    masked = logits(model)
    (pool,) = pruner.pools
    assert abs(pool.achieved(pruner.masks) - 0.5) <= pool.tolerance() + 1e-9
    assert pruner.fold() == []
    assert all(attachment_of(module) is None for module in model.modules())
    torch.testing.assert_close(logits(model), masked)
    zero = {name: model.get_parameter(name) == 0 for name in pruner.masks}
    share = sum(int(where.sum()) for where in zero.values()) / sum(where.numel() for where in zero.values())
    assert share == pytest.approx(pool.achieved(pruner.masks), abs=1e-6)  # of weights, whatever goes as one
    for name, where in zero.items():
        rows = where.t() if model.get_submodule(name.rpartition(".")[0]).__class__.__name__ == "Conv1D" else where
        rows = rows.reshape(len(rows), -1)
        if granularity == "row":
            assert torch.equal(rows.any(1), rows.all(1)) and int(rows.all(1).sum()) == int((~pruner.masks[name]).sum())
        elif granularity == "column":
            assert torch.equal(rows.any(0), rows.all(0))
        elif granularity == "2:4":
            assert (rows.reshape(-1, 4).sum(1) == 2).all()
        elif granularity == "block":
            assert rows[:4, :3].all() or not rows[:4, :3].any()


def wide(module) -> int:
    """Inputs of a layer whose weight can be pruned; 0 for other modules."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() < 2 or isinstance(module, nn.Embedding):
        return 0
    return weight.shape[0] if type(module).__name__ == "Conv1D" else weight[0].numel()


def test_wanda_compares_single_weights_within_their_output_row() -> None:
    model = tiny_models.bert()
    pruner = pruner_of(model, structures={"weights": 0.5}, criterion="wanda")
    train(model, pruner)
    pruner.fold()
    for name in pruner.masks:
        zeros = (model.get_parameter(name) == 0).sum(1)
        assert (zeros == model.get_parameter(name).shape[1] // 2).all()


def test_no_row_pays_for_the_rounding_of_the_others() -> None:
    """Of 32 inputs, 17.6 are to stay: at least 17 in every row."""
    model = tiny_models.bert()
    pruner = pruner_of(model, structures={"weights": 0.45}, criterion="wanda", allocation="per_layer")
    train(model, pruner)
    pruner.fold()
    for name in pruner.masks:
        kept = model.get_parameter(name) != 0
        assert int(kept.sum()) == math.floor(0.55 * kept.numel() + 0.5)
        assert int(kept.sum(1).min()) >= math.floor(0.55 * kept.shape[1])


def test_wanda_reads_the_inputs_of_the_layer() -> None:
    model = tiny_models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    seen = []
    layer = model.bert.encoder.layer[0].output.dense
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    pruner = pruner_of(model, structures={"ffn": 0.5}, criterion="wanda", score_decay=0.0)
    train(model, pruner, steps=range(1), learning_rate=0.0)
    handle.remove()
    norm = seen[0].flatten(0, -2).square().mean(0).sqrt()
    expected = layer.weight.detach().abs().sum(0) * norm
    name = "bert.encoder.layer.0.ffn"
    torch.testing.assert_close(pruner.pools[0].method.score(name, pruner.units[name].evidence), expected)


def test_block_influence_measures_what_a_layer_changes() -> None:
    model = tiny_models.bert(num_hidden_layers=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    states = []
    pruner = pruner_of(model, structures={"layers": 0.34}, criterion="block_influence", score_decay=0.0)
    for layer in model.bert.encoder.layer:
        layer.register_forward_hook(lambda m, args, out: states.append((args[0], out)))
    train(model, pruner, steps=range(1), learning_rate=0.0)
    changes = [1 - torch.cosine_similarity(a, b if torch.is_tensor(b) else b[0], dim=-1).mean() for a, b in states]
    (name,) = pruner.masks
    scores = pruner.pools[0].method.score(name, pruner.units[name].evidence)
    torch.testing.assert_close(scores, torch.stack(changes).detach())


def test_what_was_pruned_comes_back_only_where_it_may() -> None:
    """The scores turn round at half time."""
    for regrow in (False, True):
        model = tiny_models.bert()
        pruner = pruner_of(model, structures={"ffn": 0.5}, criterion="l2", schedule="linear", regrow=regrow, end=6)
        train(model, pruner, steps=range(3))
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
        with torch.no_grad():
            for layer, mask in zip(model.bert.encoder.layer, before.values(), strict=True):
                layer.output.dense.weight[:, ~mask] += 100.0
        train(model, pruner, steps=range(3, 6), learning_rate=0.0)
        came_back = sum(int((pruner.masks[name] & ~before[name]).sum()) for name in before)
        assert (came_back > 0) == regrow
        assert achieved_sparsity(pruner.masks) == 0.5


def test_rules_are_for_parts_of_the_model() -> None:
    model = tiny_models.bert(num_hidden_layers=3)
    rules = (
        PruningRule(match=(r"layer\.0\.",), structures={"ffn": 0.25}, criterion="l2"),
        PruningRule(match=(r"layer\.[01]\.attention",), min_units=3),
    )
    with pytest.raises(TargetError, match=r"highest sparsity allowed here is 0\.2500"):
        pruner_of(model, structures={"heads": 0.5, "ffn": 0.75}, rules=rules)
    rules = (rules[0], PruningRule(match=(r"layer\.[01]\.attention",), structures={"heads": 0.25}))
    pruner = pruner_of(model, structures={"heads": 0.5, "ffn": 0.75}, rules=rules)
    train(model, pruner)
    assert {pool.name: sorted(pool.layers) for pool in pruner.pools} == {
        "ffn_rule0": ["bert.encoder.layer.0.ffn"],
        "heads_rule1": [f"bert.encoder.layer.{i}.attention.heads" for i in (0, 1)],
        "heads": ["bert.encoder.layer.2.attention.heads"],
        "ffn": [f"bert.encoder.layer.{i}.ffn" for i in (1, 2)],
    }
    for pool in pruner.pools:
        assert achieved_sparsity({name: pruner.masks[name] for name in pool.layers}) == pool.sparsity


def test_rules_may_cover_the_whole_model() -> None:
    """Then what the config around them says is for no group."""
    model = tiny_models.bert()
    rules = (
        PruningRule(match=(r"layer\.0\.",), criterion="l1"),
        PruningRule(match=(r"layer\.1\.",), criterion="l2", structures={"ffn": 0.25}),
    )
    pruner = pruner_of(model, structures={"ffn": 0.5}, rules=rules)
    train(model, pruner)
    first, second = (f"bert.encoder.layer.{i}.ffn" for i in (0, 1))
    assert {pool.name: list(pool.layers) for pool in pruner.pools} == {"ffn_rule0": [first], "ffn_rule1": [second]}
    assert [pool.config.criterion for pool in pruner.pools] == ["l1", "l2"]
    assert (int(pruner.masks[first].sum()), int(pruner.masks[second].sum())) == (22, 33)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"structures": {"experts": 0.5}, "criterion": "l2"}, "the model has no 'experts' to prune"),
        ({"structures": {"ffn": 0.5}, "rules": ({"match": ["nowhere"], "min_units": 2},)}, "rules.0..match: 'nowhere'"),
        (
            {
                "structures": {"ffn": 0.5, "experts": 0.5},
                "criterion": "l2",
                "rules": ({"match": ["layer"], "min_units": 2},),
            },
            "the model has no 'experts' to",
        ),
        ({"structures": {"weights": 0.25}, "granularity": "3:4", "criterion": "l2"}, "no multiple of 4"),
    ],
)
def test_what_the_model_cannot_give_is_refused_and_leaves_no_trace(settings, message) -> None:
    model = tiny_models.bert(intermediate_size=46)
    with pytest.raises(TargetError, match=message):
        pruner_of(model, **settings)
    assert all(attachment_of(module) is None for module in model.modules())


def test_the_state_brings_everything_back() -> None:
    settings = {"structures": {"heads": 0.5, "ffn": 0.5}, "criterion": "movement"}
    first = tiny_models.bert()
    one = pruner_of(first, **settings)
    train(first, one, steps=range(3))
    second = tiny_models.bert()
    second.load_state_dict(first.state_dict())
    two = pruner_of(second, **settings)
    restore(two, {name: each.clone() for name, each in state_of(one).items()}, dict(one.thresholds), 3)
    for model, pruner in ((first, one), (second, two)):
        train(model, pruner, steps=range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(one.masks[name], two.masks[name]) for name in one.masks)
    with pytest.raises(TrainingError, match="belong to other groups"):
        restore(two, {"mask.x": torch.ones(1)}, {}, 3)


def test_a_layer_that_is_dropped_first_thing_after_resuming_is_none_that_never_ran() -> None:
    settings = {"structures": {"ffn": 0.5}, "criterion": "taylor"}
    one = pruner_of(tiny_models.bert(), **settings)
    train(one.model, one, steps=range(3))
    two = pruner_of(tiny_models.bert(), **settings)
    first = next(iter(two.masks))

    def dropped(mine, like):
        mine = {key: None if key.startswith(first) else each for key, each in mine.items()}
        return alone(mine, like)

    with pytest.raises(TrainingError, match="so far"):
        step_of(two, 3, dropped)
    restore(two, {name: each.clone() for name, each in state_of(one).items()}, {}, 3)
    step_of(two, 3, dropped)
    assert torch.equal(state_of(two)[f"score.{first}"], state_of(one)[f"score.{first}"])


def test_no_two_tensors_of_a_state_share_memory() -> None:
    """Files of safetensors refuse that."""
    model = tiny_models.bert()
    pruner = pruner_of(model, structures={"heads": 0.5, "ffn": 0.5}, criterion="taylor")
    train(model, pruner, steps=range(3))
    state = state_of(pruner)
    assert len({each.untyped_storage().data_ptr() for each in state.values()}) == len(state) > 4


@pytest.mark.parametrize("name", ["score.bert.encoder.layer.0.ffn", "score.bert.encoder.layer.9.ffn"])
def test_scores_of_other_layers_or_sizes_are_refused(name) -> None:
    pruner = pruner_of(tiny_models.bert(), structures={"heads": 0.5, "ffn": 0.5}, criterion="movement")
    before = {key: each.clone() for key, each in state_of(pruner).items()}
    with pytest.raises(TrainingError, match=r"scores belong to other groups or criteria \(first: 'bert.*resume with"):
        restore(pruner, {**before, name: torch.ones(3)}, {}, 3)
    assert all(torch.equal(each, before[key]) for key, each in state_of(pruner).items())


def test_factors_are_folded_into_the_weights() -> None:
    """Slimming: what training multiplied with, the plain model computes with."""
    model = tiny_models.bert()
    pruner = pruner_of(model, structures={"heads": 0.25, "ffn": 0.5}, criterion="slim", options={"learning_rate": 0.1})
    train(model, pruner)
    factors = pruner.pools[1].method.tensors["bert.encoder.layer.0.ffn"]
    assert (factors - 1).abs().max() > 0.1
    masked = logits(model)
    assert pruner.fold() == []
    torch.testing.assert_close(logits(model), masked, rtol=1e-5, atol=1e-6)
