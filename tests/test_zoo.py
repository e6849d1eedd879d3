"""Every entry of the zoo builds the same model each time, and runs."""

import pytest
import tiny_models
import torch
from torch.utils._pytree import tree_leaves
from zoo import OTHERS, VARIANTS, ZOO
from zoo.base import Tiny, join, table

from hf_compress import make_example_inputs

EAGER = ["bert", "gpt2", "gpt_neox", "llama", "bart", "t5", "vit", "clip", "whisper", "wav2vec2"]


SOON = [pytest.param(entry, id=entry.name) for entry in join(ZOO, VARIANTS).values()]
LATER = [pytest.param(entry, id=entry.name, marks=pytest.mark.slow) for entry in OTHERS.values()]


@torch.no_grad()
def outputs(entry, model):
    result = model(**(entry.example_inputs(model) or make_example_inputs(model)))
    leaves = tree_leaves(dict(result))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


@pytest.mark.parametrize("entry", ZOO.values(), ids=str)
def test_same_model_each_time(entry) -> None:
    torch.manual_seed(1)
    first = entry().state_dict()
    torch.manual_seed(2)
    second = entry().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("entry", [*SOON, *LATER])
def test_runs(entry) -> None:
    results = outputs(entry, entry())
    assert results
    assert all(torch.isfinite(result).all() for result in results)
    assert any(result.abs().max() > 0 for result in results)


@pytest.mark.parametrize("name", EAGER)
def test_eager_attention_computes_the_same(name) -> None:
    entry = ZOO[name]
    eager = entry(attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    for expected, actual in zip(outputs(entry, entry()), outputs(entry, eager), strict=True):
        assert tiny_models.relative_error(expected, actual) < 1e-5


def test_the_random_state_stays() -> None:
    before = torch.random.get_rng_state()
    ZOO["bert"]()
    assert torch.equal(before, torch.random.get_rng_state())


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="two entries called 'a'"):
        table(Tiny("a", "BertModel"), Tiny("a", "BertModel"))
