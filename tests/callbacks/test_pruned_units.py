"""Feature losses of a masked student are those of the student without the masked units."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from features_by_hand import DROPOUT, PAD
from masked_models import gated, prunable, random_masks
from torch import Tensor
from zoo import ZOO, randomize

from hf_compress import dimension_groups, shrink
from hf_compress.callbacks.feature_terms import FeatureTerm
from hf_compress.callbacks.projections import Projections
from hf_compress.config import FeatureConfig
from hf_compress.instruments.features import Features, FeatureTap
from hf_compress.instruments.gate import Gate
from hf_compress.instruments.left import LeftUnits

DYNAMIC = {"layers": "dynamic"}

LOSSES: dict[str, dict[str, Any]] = {
    "maps": {"loss": "attention_kl"},
    "maps, dynamic": {"loss": "attention_mse", **DYNAMIC},
    "queries": {"loss": "relations", "of": ["query"], "options": {"relation_heads": 2}},
    "keys and values": {"loss": "relations", "of": ["key", "value"], "options": {"relation_heads": 2}},
    "channels": {"loss": "nst"},
    "channels, dynamic": {"loss": "nst_linear", **DYNAMIC},
    "tokens": {"loss": "gram"},
}
"""Those that compare models of other sizes as they are."""


def model(kind: str, seed: int = 0) -> Any:
    special = PAD if kind == "bart" else {}
    return randomize(ZOO[kind](**DROPOUT.get(kind, {}), **special), seed).eval()


def batch(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "decoder_input_ids": ids[:, :5]} if kind in ("t5", "bart") else inputs


def watched(model: Any, term: FeatureTerm, inputs: Mapping[str, Any]) -> Features:
    tap = FeatureTap(model, term.wants())
    return tap.read(model(**tap.prepare(inputs)))


def loss_of(student: Any, teacher: Features, config: FeatureConfig, inputs: Mapping[str, Any]) -> Tensor:
    term = FeatureTerm("term", config, student, Projections())
    features = watched(student, term, inputs)
    kept = {name: [True] * stack.num_layers for name, stack in features.stacks.items()}
    return term.losses(features, teacher, inputs, kept, LeftUnits(student))


def masks_of(student: Any, *kinds: str) -> tuple[Any, dict[str, Tensor]]:
    groups = dimension_groups(student)
    chosen = prunable(groups, *kinds)
    masks = random_masks(chosen, seed=2, lose=True)
    for name, mask in masks.items():  # half of each, so that two relation heads divide what is left
        size = len(mask) // 2
        masks[name] = torch.zeros_like(mask).index_fill(0, torch.arange(1, 1 + size), True)
    return groups, masks


CASES = [
    ("bert", ("heads",), "maps"),
    ("bert", ("heads",), "queries"),
    ("bert", ("head_dim",), "queries"),
    ("bert", ("heads", "head_dim"), "keys and values"),
    ("bert", ("hidden",), "channels"),
    ("gpt2", ("heads",), "maps, dynamic"),
    ("gpt2", ("heads", "head_dim"), "keys and values"),
    ("gpt2", ("hidden",), "channels, dynamic"),
    ("llama", ("heads",), "maps"),
    ("llama", ("heads",), "keys and values"),
    ("llama", ("hidden",), "tokens"),
    ("t5", ("heads",), "maps"),
    ("t5", ("heads",), "keys and values"),
    ("bart", ("hidden",), "channels"),
]


@pytest.mark.parametrize(("kind", "kinds", "name"), CASES, ids=str)
def test_the_loss_is_that_of_the_shrunk_student(kind: str, kinds: tuple[str, ...], name: str) -> None:
    student, teacher, inputs = model(kind), model(kind, seed=1), batch(kind)
    config = FeatureConfig(**LOSSES[name])
    with torch.no_grad():
        answers = watched(teacher, FeatureTerm("term", config, teacher, Projections()), inputs)
    groups, masks = masks_of(student, *kinds)
    small = shrink(student, masks)
    with torch.no_grad():
        expected = loss_of(small, answers, config, inputs)
    with gated(student, groups, masks):
        actual = loss_of(student, answers, config, inputs)
        actual.sum().backward()
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(loss_of(student, answers, config, inputs), expected, rtol=1e-2)
    if "heads" in kinds:
        assert_untaught(student, groups, masks)


def assert_untaught(student: Any, groups: Any, masks: Mapping[str, Tensor]) -> None:
    """Nothing moves the weights of heads that are gone."""
    parameters, taught = dict(student.named_parameters()), False
    for group in groups:
        for part in group.slices if group.name in masks and group.kind == "heads" else ():
            gradient = parameters[part.parameter].grad
            if gradient is None or part.parameter.endswith("relative_attention_bias.weight"):
                continue
            rows = gradient.movedim(part.dim, 0)[part.index]
            assert not rows[~masks[group.name]].any()
            taught = taught or bool(rows[masks[group.name]].any())
    assert taught


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("projection", ["where needed", "always"])
def test_channels_that_are_gone_are_compared_with_nothing(kind: str, projection: Any) -> None:
    """Of as wide a teacher the same channels are compared, and a map reads only what is left."""
    student, teacher, inputs = model(kind), model(kind, seed=1), batch(kind)
    config = FeatureConfig(loss="hidden_mse", projection=projection)
    maps = Projections()
    term = FeatureTerm("term", config, student, maps)
    groups, masks = masks_of(student, "hidden")
    (mask,) = masks.values()
    small = shrink(student, masks)
    with torch.no_grad(), gated(student, groups, masks):
        features, answers = watched(student, term, inputs), watched(teacher, term, inputs)
        kept = {name: [True] * stack.num_layers for name, stack in features.stacks.items()}
        term.prepare(features, answers, inputs)
        actual = term.losses(features, answers, inputs, kept, LeftUnits(student))
        pairs = [each(**inputs, output_hidden_states=True).hidden_states[1:] for each in (small, teacher)]
    total = torch.zeros(3)
    there = inputs["attention_mask"].bool()
    for i, (own, theirs) in enumerate(zip(*pairs, strict=True)):
        if projection == "always":
            (name,) = [each for each in maps.rates if f".{i}" in each]
            own = own @ maps.tensors[name].detach()[mask]
        else:
            theirs = theirs[..., mask]
        for n in range(3):
            total[n] += (own[n][there[n]] - theirs[n][there[n]]).square().mean() / 2
    torch.testing.assert_close(actual, total, rtol=1e-4, atol=1e-6)


def test_relation_heads_divide_the_width_that_is_left() -> None:
    """By default there are as many as the teacher has heads, which divide the width before pruning."""
    sizes = {"hidden_size": 12, "num_attention_heads": 4, **DROPOUT["bert"]}
    student, teacher = (randomize(ZOO["bert"](**sizes), seed).eval() for seed in (0, 1))
    inputs, config = batch("bert"), FeatureConfig(loss="relations")
    groups = dimension_groups(student)
    masks = {group.name: torch.tensor([True, False, True, True]) for group in prunable(groups, "heads")}
    small = shrink(student, masks)
    with torch.no_grad():
        answers = watched(teacher, FeatureTerm("term", config, teacher, Projections()), inputs)
        one = FeatureConfig(loss="relations", options={"relation_heads": 1})  # of 9 columns there are no 2 or 4 parts
        expected = loss_of(small, answers, one, inputs)
        with gated(student, groups, masks):
            actual = loss_of(student, answers, config, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_heads_that_are_closed_at_random_are_not_gone() -> None:
    student = model("bert")
    groups = [group for group in dimension_groups(student) if group.kind == "heads"]
    gate = Gate(groups[0], student, needs_gradient=False)
    gate.set_values(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 0.7, 0.9, 1.0]))
    tap = FeatureTap(student.train(), {"attentions"})
    attention = tap.read(student(**tap.prepare(batch("bert")))).stacks["encoder"].attention[0]
    assert attention is not None and attention.query is not None
    left = LeftUnits(student).heads(attention, attention.query)
    assert left is not None and left.tolist() == [1, 2, 3]


def test_a_layer_without_heads_takes_no_part() -> None:
    student, teacher, inputs = model("bert"), model("bert", seed=1), batch("bert")
    config = FeatureConfig(loss="attention_kl")
    with torch.no_grad():
        answers = watched(teacher, FeatureTerm("term", config, teacher, Projections()), inputs)
        groups = dimension_groups(student)
        first, second = (group.name for group in prunable(groups, "heads"))
        one = FeatureConfig(loss="attention_kl", layers={1: 1})
        # So that the next layer is the same with and without the heads.
        student.bert.encoder.layer[0].attention.output.dense.weight.zero_()
        expected = loss_of(student, answers, one, inputs)
        with gated(student, groups, {first: torch.zeros(4, dtype=torch.bool), second: torch.ones(4, dtype=torch.bool)}):
            actual = loss_of(student, answers, config, inputs)
    torch.testing.assert_close(actual, expected)
