import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress import TargetError
from hf_compress.pruning.allocate import Limits, achieved_sparsity, check_reachable, tolerance
from hf_compress.registry import allocators

SCORES = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.tensor([8.0, 7.0, 6.0, 5.0])}


def test_per_layer_takes_the_same_share_of_each() -> None:
    masks = allocators.get("per_layer")(SCORES, 0.5, Limits())
    assert masks["a"].tolist() == [True, False, True, False]
    assert masks["b"].tolist() == [True, True, False, False]


def test_global_lets_layers_compete() -> None:
    masks = allocators.get("global")(SCORES, 0.375, Limits())
    assert masks["a"].tolist() == [True, False, False, False]
    assert masks["b"].all()


def test_global_honors_the_limit_of_a_single_layer() -> None:
    masks = allocators.get("global")(SCORES, 0.5, Limits(max_sparsity=0.5))
    assert [int(mask.sum()) for mask in masks.values()] == [2, 2]
    masks = allocators.get("global")(SCORES, 0.5, Limits(min_units=3))
    assert [int(mask.sum()) for mask in masks.values()] == [3, 3]  # the limit wins; check_reachable refuses before


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(allocators)),
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    sparsity=st.floats(0, 0.99),
    multiple=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 10**6),
)
def test_every_allocator_reaches_the_sparsity_within_its_limits(name, sizes, sparsity, multiple, seed) -> None:
    """Conformance: any registered allocator, any sizes."""
    generator = torch.Generator().manual_seed(seed)
    scores = {f"g{i}": torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    limits = Limits(multiple_of=multiple)
    try:
        check_reachable("ffn", {k: len(v) for k, v in scores.items()}, sparsity, limits)
    except TargetError:
        return
    masks = allocators.get(name)(scores, sparsity, limits)
    total = {k: len(v) for k, v in scores.items()}
    assert abs(achieved_sparsity(masks) - sparsity) <= tolerance(total, limits) + 1e-9
    for key, mask in masks.items():
        kept = int(mask.sum())
        assert kept == len(mask) or (kept >= 1 and kept % multiple == 0)
        if 0 < kept < len(mask):
            assert scores[key][mask].min() >= scores[key][~mask].max()


def test_unreachable_sparsity_says_what_is_reachable() -> None:
    with pytest.raises(TargetError, match=r"highest sparsity allowed here is 0\.5000"):
        check_reachable("heads", {"a": 4, "b": 4}, 0.9, Limits(min_units=2))
