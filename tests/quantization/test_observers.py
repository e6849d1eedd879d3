from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_numerics import symmetric_scale
from torch import Tensor
from torch._subclasses import FakeTensorMode

from hf_compress.errors import ConfigError, TargetError
from hf_compress.quantization.granularity import PER_TENSOR, PER_TOKEN, per_channel, per_group
from hf_compress.quantization.grid import Grid
from hf_compress.quantization.observers import Ema, HistogramObserver, MinMax, Observer, Percentile
from hf_compress.registry import observers

NAMES = ["ema", "entropy", "min_max", "mse", "percentile"]
EXACT = [name for name in NAMES if name != "ema"]
"""Those for which the order and the place of values make no difference."""


def make(name: str, grid: Grid | None = None, granularity=PER_TENSOR, **options) -> Observer:
    return observers.get(name)(grid or Grid(), granularity, **options)


def batches(count: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 8, generator=generator) * 3.0**i for i in range(count)]


def reduces_of(ranks: list[Observer]) -> list[Callable[[Tensor, str], Tensor]]:
    """All-reduce for ranks that are merged one after the other: each collective is worked out from fresh copies."""
    operations = {
        "min": lambda parts: torch.stack(parts).amin(0),
        "max": lambda parts: torch.stack(parts).amax(0),
        "sum": lambda parts: torch.stack(parts).sum(0),
    }
    sent: list[list[Tensor]] = [[] for _ in ranks]

    def on(rank: int, answers: list[Tensor] | None) -> Callable[[Tensor, str], Tensor]:
        def reduce(tensor: Tensor, operation: str) -> Tensor:
            sent[rank].append(tensor)
            if answers is not None and len(sent[rank]) <= len(answers):
                return answers[len(sent[rank]) - 1]
            raise StopIteration(operation)

        return reduce

    # Every rank runs up to its next collective; once all have, the answer is known.
    answers: list[Tensor] = []
    while True:
        operation = ""
        for rank, observer in enumerate(ranks):
            sent[rank].clear()
            trial = type(observer)(observer.grid, observer.granularity)
            trial.load(observer.state)
            try:
                trial.merge(on(rank, answers))
            except StopIteration as stop:
                operation = stop.value
        if not operation:
            break
        answers.append(operations[operation]([parts[-1] for parts in sent]))
    for parts in sent:
        parts.clear()
    return [on(rank, answers) for rank in range(len(ranks))]


def test_the_registry_has_them_all() -> None:
    assert list(observers) == NAMES


@pytest.mark.parametrize("granularity", [PER_TENSOR, per_channel(0), per_channel(-1), per_group(4)], ids=str)
def test_min_max_is_the_least_and_the_largest_ever(granularity) -> None:
    observer = MinMax(Grid(), granularity)
    for x in batches():
        observer.observe(x)
    low, high = observer.range()
    stacked = torch.cat([granularity.blocks(x) for x in batches()], dim=1)
    assert torch.equal(low, stacked.min(1).values) and torch.equal(high, stacked.max(1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_min_max_of_a_weight_gives_the_scale_of_int8_dynamic(dtype: torch.dtype) -> None:
    weight = batches(1)[0].to(dtype)
    observer = MinMax(Grid(), per_channel(0))
    observer.observe(weight)
    scale = observer.grid.parameters(*observer.range())[0]
    assert torch.equal(per_channel(0).spread(scale, weight.shape), symmetric_scale(weight))


def test_ema_is_that_of_torchs_own_observer() -> None:
    from torch.ao.quantization import MovingAverageMinMaxObserver

    observer, reference = Ema(Grid(), momentum=0.9), MovingAverageMinMaxObserver(averaging_constant=0.1)
    for x in batches():
        observer.observe(x)
        reference(x)
    low, high = observer.range()
    assert low.item() == pytest.approx(reference.min_val.item(), rel=1e-5)
    assert high.item() == pytest.approx(reference.max_val.item(), rel=1e-5)


def test_ema_steps_may_be_made_of_micro_batches() -> None:
    whole, parts = Ema(Grid(), per_channel(-1)), Ema(Grid(), per_channel(-1))
    for x in batches():
        whole.observe(x)
        step = MinMax(Grid(), per_channel(-1))
        for part in x.split(2):
            step.observe(part)
        parts.update(*step.range())
    assert all(torch.equal(a, b) for a, b in zip(whole.range(), parts.range(), strict=True))


def test_ema_leaves_a_block_without_values_as_it_was() -> None:
    observer = Ema(Grid(), per_channel(0), momentum=0.5)
    keep = torch.tensor([[True], [False]])
    observer.observe(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), keep)
    assert observer.range()[1].tolist() == [2.0, 0.0]
    observer.observe(torch.tensor([[4.0, 4.0], [6.0, 8.0]]))
    assert observer.range()[1].tolist() == [3.0, 8.0]  # for the second block it is the first update
    observer.observe(torch.tensor([[9.0, 9.0], [0.0, 0.0]]), ~keep)
    assert observer.range()[1].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("percentile", [60.0, 95.0, 99.9, 100.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentiles_are_numpys_to_one_bin(percentile: float, symmetric: bool) -> None:
    observer = Percentile(Grid(symmetric=symmetric), percentile=percentile)
    for x in batches():
        observer.observe(x)
    values = torch.cat(batches()).flatten().numpy()
    low, high = (end.item() for end in observer.range())
    width = observer.histogram().width().item()
    assert width == 2 * 2 ** np.ceil(np.log2(np.abs(values).max())) / 4096
    if symmetric:
        expected = np.percentile(np.abs(values), percentile, method="inverted_cdf")
        assert low == -high and expected - 1e-6 <= high <= expected + width
    else:
        assert -1e-6 <= high - np.percentile(values, percentile, method="inverted_cdf") <= width
        assert -1e-6 <= np.percentile(-values, percentile, method="inverted_cdf") * -1 - low <= width


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_removed_channels_are_as_if_they_were_not_there(name: str, symmetric: bool) -> None:
    weight = batches(1)[0]
    weight[:, 3] = 1000.0
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    factors = torch.ones(1, 8)
    factors[0, 3] = 0.0
    for granularity in (PER_TENSOR, per_channel(0)):
        masked, small, full = (make(name, Grid(symmetric=symmetric), granularity) for _ in range(3))
        masked.observe(weight, factors != 0)
        small.observe(weight[:, kept])
        full.observe(weight)
        assert all(torch.equal(a, b) for a, b in zip(masked.range(), small.range(), strict=True))
        assert not torch.equal(masked.range()[1], full.range()[1])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_kept_and_zeros_give_a_range_of_zeros(name: str) -> None:
    for x, keep in ((torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.bool)), (torch.zeros(2, 4), None)):
        observer = make(name, granularity=per_channel(0))
        observer.observe(x, keep)
        assert [end.tolist() for end in observer.range()] == [[0.0, 0.0]] * 2
    observer.observe(torch.full((2, 4), 0.01))
    low, high = observer.range()
    assert (high > 0).all() and (high <= 0.0101).all() and (low <= high).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows(name: str, value: float) -> None:
    x = batches(1)[0]
    x[2, 3] = value
    observer = make(name)
    observer.observe(x)
    observer.observe(batches(1)[0])
    low, high = observer.range()
    assert not torch.isfinite(torch.cat([low, high])).all()


@pytest.mark.parametrize("name", EXACT)
@given(order=st.permutations(range(4)), cuts=st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_order_and_ranks_make_no_difference(name: str, order: list[int], cuts: int) -> None:
    data = batches()
    straight = make(name, granularity=per_channel(-1))
    for x in data:
        straight.observe(x)
    ranks = [make(name, granularity=per_channel(-1)) for _ in range(2)]
    for position, index in enumerate(order):
        ranks[0 if position < cuts else 1].observe(data[index])
    for rank, reduce in zip(ranks, reduces_of(ranks), strict=True):
        rank.merge(reduce)
        assert rank.state.keys() == straight.state.keys() == rank.names
        assert all(torch.equal(rank.state[key], straight.state[key]) for key in straight.state)


def test_ranks_of_an_average_are_joined_by_the_mean() -> None:
    ranks = [make("ema", granularity=per_channel(0)) for _ in range(2)]
    ranks[0].observe(torch.tensor([[-1.0, 3.0], [1.0, 2.0]]), torch.tensor([[True], [False]]))
    ranks[1].observe(torch.tensor([[-3.0, 4.0], [5.0, 6.0]]))
    for rank, reduce in zip(ranks, reduces_of(ranks), strict=True):
        rank.merge(reduce)
        low, high = rank.range()
        assert low.tolist() == [-2.0, 5.0] and high.tolist() == [3.5, 6.0]


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(name: str) -> None:
    straight, first = make(name), make(name)
    for x in batches():
        straight.observe(x)
    for x in batches()[:2]:
        first.observe(x)
    second = make(name)
    second.load(first.state)
    first.observe(torch.full((6, 8), 1e6))  # must not reach the copy
    for x in batches()[2:]:
        second.observe(x)
    assert all(torch.equal(second.state[key], straight.state[key]) for key in straight.names)
    assert all(torch.equal(a, b) for a, b in zip(second.range(), straight.range(), strict=True))
    assert not any(tensor.requires_grad for tensor in second.state.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_nothing_waits_for_the_device(name: str, symmetric: bool) -> None:
    with FakeTensorMode():  # has no values: whatever asks for one raises
        observer = make(name, Grid(symmetric=symmetric), per_group(4))
        for _ in range(2):
            observer.observe(torch.empty(6, 8), torch.empty(6, 1, dtype=torch.bool))
        scale, _ = observer.grid.parameters(*observer.range())
        assert scale.shape == (12,)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_neither_needed_nor_kept(name: str) -> None:
    x = batches(1)[0].requires_grad_()
    observer = make(name)
    observer.observe(x * 2)
    assert not observer.range()[1].requires_grad


@pytest.mark.parametrize("name", EXACT[:1])
def test_bins_split_the_range_exactly(name: str) -> None:
    observer = make(name, num_bins=16)
    assert isinstance(observer, HistogramObserver)
    observer.observe(torch.tensor([0.0, 0.24, 0.25, -0.1, -0.25, -0.26, 1.99]))
    counts, exponent = observer.histogram()
    assert exponent.tolist() == [1]
    assert counts[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 2, 1, 0, 0, 0, 0, 0, 1]
    observer.observe(torch.tensor([2.0]))  # the range doubles: bins join in twos
    counts, exponent = observer.histogram()
    assert exponent.tolist() == [2]
    assert counts[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 3, 3, 0, 0, 1, 1, 0, 0, 0]
    assert observer.histogram().magnitudes().tolist() == [[6, 0, 0, 1, 1, 0, 0, 0]]


def test_mistakes_are_refused() -> None:
    with pytest.raises(TargetError, match="nothing was observed"):
        make("mse").range()
    with pytest.raises(TargetError, match="nothing was observed"):
        make("ema").merge(lambda tensor, operation: tensor)
    with pytest.raises(ConfigError, match="token"):
        make("min_max", granularity=PER_TOKEN)
    observer = make("min_max", granularity=per_channel(0))
    observer.observe(torch.zeros(3, 4))
    with pytest.raises(TargetError, match="got 5 blocks"):
        observer.observe(torch.zeros(5, 4))
    with pytest.raises(TargetError, match=r"\['high', 'low'\]"):
        make("ema").load(observer.state)
    observer = make("mse", num_bins=64)
    observer.observe(torch.ones(3))
    with pytest.raises(TargetError, match="64 bins; allowed: 4096"):
        make("mse").load(observer.state)
    for name, options in (
        ("ema", {"momentum": 1.0}),
        ("percentile", {"percentile": 50.0}),
        ("percentile", {"num_bins": 1000}),
        ("mse", {"num_candidates": 0}),
    ):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}: got"):
            make(name, **options)
