"""What is measured is what layers see, no more is run than needed, and nothing is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from oneshot_models import batches, for_language, prune, trained
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress import PruningConfig, make_example_inputs
from hf_compress.graph.capture import evaluating
from hf_compress.oneshot.calibration import Calibration
from hf_compress.oneshot.linear import LinearLayer, linear_layer


def layers_of(model: PreTrainedModel, *endings: str) -> dict[str, LinearLayer]:
    names = [name for name, module in model.named_modules() if name.endswith(endings) and isinstance(module, nn.Linear)]
    assert names
    return {name: linear_layer(model, name, "test") for name in names}


def seen_inputs(model: PreTrainedModel, names: list[str], data: list[Any]) -> dict[str, Tensor]:
    """Inputs of every call, without padding, by plain hooks."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in data:
        kept = batch["attention_mask"].bool()

        def hook(name: str, kept: Tensor = kept) -> Callable[..., None]:
            return lambda module, args: found[name].append(args[0][kept])

        handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
        with torch.no_grad():
            model.eval()(**batch)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("kind", ["bert", "llama", "albert"])
def test_grams_are_sums_over_all_calls_and_tokens(kind: str) -> None:
    if kind == "albert":
        torch.manual_seed(0)
        model = tiny_models.albert()
        data = [{**make_example_inputs(model, batch_size=2, seed=seed)} for seed in range(2)]
    else:
        model = trained(kind)
        data = batches(2) if kind == "bert" else for_language(batches(2))
    layers = layers_of(model, "output.dense", "o_proj", "down_proj", "ffn_output")
    with evaluating(model):
        calibration = Calibration(model, data)
        calibration.stages(layers)
        grams = calibration.grams(layers, "test")
    expected = seen_inputs(model, list(layers), data)
    for name, x in expected.items():
        torch.testing.assert_close(grams[name], x.double().T @ x.double(), rtol=1e-4, atol=1e-4)
    if kind == "albert":
        assert len(next(iter(expected.values()))) > sum(int(batch["attention_mask"].sum()) for batch in data)


def test_layers_with_the_same_input_are_one_stage() -> None:
    model = trained("llama")
    layers = layers_of(model, "_proj")
    with evaluating(model):
        stages = Calibration(model, for_language(batches(2))).stages(layers)
    short = [[name.removeprefix("model.layers.") for name in stage] for stage in stages]
    assert short[:4] == [
        ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"],
        ["0.self_attn.o_proj"],
        ["0.mlp.gate_proj", "0.mlp.up_proj"],
        ["0.mlp.down_proj"],
    ]
    assert len(short) == 8


def test_a_pass_ends_at_the_last_layer_that_is_watched() -> None:
    model = trained("bert")
    first = "bert.encoder.layer.0.attention.output.dense"
    layers = {first: linear_layer(model, first, "test")}
    later: list[str] = []
    with evaluating(model):
        calibration = Calibration(model, batches(2))
        calibration.stages(layers)
        model.bert.encoder.layer[0].intermediate.register_forward_pre_hook(lambda module, args: later.append("ran"))
        calibration.grams(layers, "test")
    assert later == []


@pytest.mark.parametrize("criterion", ["l2", "wanda", "obs", "block_influence", "taylor", "fisher", "kwon"])
def test_autograd_runs_only_for_gradients(criterion: str) -> None:
    model = trained("bert").train()
    seen: set[tuple[bool, bool]] = set()
    handle = model.bert.encoder.register_forward_hook(
        lambda module, args, output: seen.add((torch.is_grad_enabled(), module.training))
    )
    structures = {"layers": 0.5} if criterion == "block_influence" else {"heads": 0.5, "ffn": 0.5}
    prune(model, batches(1), PruningConfig(structures={"heads": 0.5}), structures=structures, criterion=criterion)
    handle.remove()
    assert all(not training for _, training in seen)
    assert ((True, False) in seen) == (criterion in ("taylor", "fisher", "kwon"))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_block_influence_is_one_minus_the_mean_cosine() -> None:
    model, data = trained("bert"), batches(2)
    result = prune(
        model, data, PruningConfig(structures={"heads": 0.5}), structures={"layers": 0.5}, criterion="block_influence"
    )
    sums, count = torch.zeros(2), 0
    for batch in data:
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        kept = batch["attention_mask"].bool()
        for i in range(2):
            sums[i] += torch.cosine_similarity(states[i][kept], states[i + 1][kept], dim=-1).sum()
        count += int(kept.sum())
    (scores,), (mask,) = result.scores.values(), result.masks.values()
    torch.testing.assert_close(scores.float(), 1 - sums / count, rtol=1e-4, atol=1e-5)
    assert mask.tolist() == (scores == scores.max()).tolist()


@pytest.mark.parametrize("criterion", ["taylor", "taylor2", "fisher"])
def test_scores_are_gradients_of_gates(criterion: str) -> None:
    """d loss / d gate of a unit is the sum of w * dL/dw over the weights that read it."""
    model, data = trained("bert"), batches(2, 4)
    result = prune(model, data, PruningConfig(structures={"ffn": 0.5}), structures={"ffn": 0.5}, criterion=criterion)
    parts = data
    if criterion == "fisher":
        parts = [{key: value[i : i + 1] for key, value in batch.items()} for batch in data for i in range(4)]
    weight = model.bert.encoder.layer[1].output.dense.weight
    measured = []
    for part in parts:
        (gradient,) = torch.autograd.grad(model(**part).loss, weight)
        value = (gradient * weight).sum(0).detach()
        measured.append(value.abs() if criterion == "taylor" else value.square())
    expected = torch.stack(measured).mean(0)
    scores = result.scores["bert.encoder.layer.1.ffn"].float()
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-8)
