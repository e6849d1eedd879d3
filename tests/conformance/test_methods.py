"""Every registered pruning method obeys the same laws, on whatever structure it works on."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from evidence import random_evidence
from transformers import TrainerCallback

from hf_compress import PruningCallback, PruningConfig, shrink
from hf_compress.pruning.method import DeferringMethod, Setting
from hf_compress.registry import criteria

NAMES = sorted(name for name in criteria if criteria.get(name).trains)
README = Path(__file__).parents[2] / "README.md"

SPARSITY = {"heads": 0.5, "ffn": 0.5, "hidden": 0.25, "head_dim": 0.5, "layers": 0.5, "weights": 0.5}
"""By structure; BERT has no others to prune."""

CASES = [(name, kind) for name in NAMES for kind in SPARSITY if kind in criteria.get(name).structures]
DEFAULT = {"ffn", "layers", "weights"}
"""The structures of the default run; the others are slow."""


def made(name: str, **options: Any) -> Any:
    method = criteria.get(name)
    return method(method.options.from_dict(options), Setting(score_decay=0.5, seed=3, sparsity=0.5))


def take_step(method: Any, evidence: Any) -> None:
    method.step("layer", evidence)
    method.end_step()


def after_steps(name: str, evidence: list[Any]) -> Any:
    """A method that has seen these steps of one layer."""
    method = made(name)
    method.start("layer", evidence[0])
    for number, each in enumerate(evidence):
        method.share = number / len(evidence)
        take_step(method, each)
    return method


@pytest.mark.parametrize("name", NAMES)
def test_one_finite_score_a_unit(name) -> None:
    steps = [random_evidence(seed) for seed in range(3)]
    scores = after_steps(name, steps).score("layer", steps[-1])
    assert scores.shape == (7,)
    assert torch.isfinite(scores).all()
    assert scores.unique().numel() > 1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"random", "l0"}])
def test_units_that_change_places_keep_their_scores(name) -> None:
    """Not where each place has noise of its own."""
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    steps = [random_evidence(seed) for seed in range(3)]
    scores = after_steps(name, steps).score("layer", steps[-1])
    moved = [each.permuted(order) for each in steps]
    torch.testing.assert_close(after_steps(name, moved).score("layer", moved[-1]), scores[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_changes_nothing(name) -> None:
    """As the optimizer leaves it out in mixed precision."""
    good, bad = random_evidence(0), random_evidence(1)
    bad.gradients = bad.gradients * float("nan")
    bad.inputs, bad.changed = bad.inputs * float("inf"), bad.changed * float("nan")
    one, two = after_steps(name, [good]), after_steps(name, [good, bad])
    assert torch.equal(one.score("layer", good), two.score("layer", good))


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_all_there_is(name) -> None:
    """A method that is given the tensors of another goes on as that one does."""
    steps = [random_evidence(seed) for seed in range(4)]
    first = after_steps(name, steps[:2])
    second = made(name)
    second.start("layer", steps[0])
    second.tensors = {key: tensor.clone() for key, tensor in first.tensors.items()}
    for method in (first, second):
        for each in steps[2:]:
            method.share = 0.5
            take_step(method, each)
    assert torch.equal(first.score("layer", steps[-1]), second.score("layer", steps[-1]))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented(name) -> None:
    """In its own docstring with a source, its options one by one, and with a row in the README."""
    method = criteria.get(name)
    assert method.__doc__ and len(method.__doc__.split()) >= 5
    known = name in {"random", "l2"}  # chance and the norm need none
    assert known or re.search(r"Source: .*(arXiv:\d{4}\.\d{4,5})", method.__doc__, re.DOTALL), method.__doc__
    assert f"`{name}`" in README.read_text(encoding="utf-8")


class Watch(TrainerCallback):
    """Keeps the achieved sparsity after every step."""

    def __init__(self, callback: PruningCallback) -> None:
        self.callback, self.seen = callback, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.callback._pruner.pools[0].achieved(self.callback._pruner.masks))


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*case, marks=[] if case[1] in DEFAULT else pytest.mark.slow) for case in CASES],
)
@pytest.mark.filterwarnings("ignore:PruningCallback. gates stay:UserWarning")
def test_a_run_ends_with_the_sparsity_asked_for(name, kind, tiny_bert, classification_data, make_trainer) -> None:
    """Laws 2 and 8: the schedule is reached, what was trained masked is what shrink makes."""
    model = tiny_bert(num_hidden_layers=4) if kind == "layers" else tiny_bert()
    config = PruningConfig(structures={kind: SPARSITY[kind]}, criterion=name, begin=1, end=5, update_every=1)
    callback = PruningCallback(config)
    watch = Watch(callback)
    data = classification_data(32)
    trainer = make_trainer(model, data, [callback, watch], max_steps=7, learning_rate=1e-3)
    trainer.train()
    final = SPARSITY[kind]
    pool = callback._pruner.pools[0]
    assert abs(watch.seen[-1] - final) <= pool.tolerance() + 1e-9
    assert watch.seen[4:] == [watch.seen[4]] * 3
    assert watch.seen == sorted(watch.seen)
    if issubclass(criteria.get(name), DeferringMethod):
        assert watch.seen[3] == 0.0
    else:
        expected = [final * (1 - (1 - p) ** 3) for p in (0.25, 0.5, 0.75)]
        assert all(abs(a - b) <= pool.tolerance() + 1e-9 for a, b in zip(watch.seen[1:4], expected, strict=True))
    inputs = {"input_ids": torch.arange(3, 13).view(2, 5)}
    with torch.no_grad():
        trained = model.eval()(**inputs).logits
    if kind == "weights":
        zeros = {n: int((p == 0).sum()) for n, p in model.named_parameters() if n in callback._pruner.masks}
        assert zeros == {n: int((~mask).sum()) for n, mask in callback._pruner.masks.items()}
        return
    small = shrink(trainer)
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, trained, rtol=1e-5, atol=1e-6)
    assert small.num_parameters() < model.num_parameters()
