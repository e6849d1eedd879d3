"""Ranges and learned steps between the optimizer steps, on one rank and on two, each a thread."""

from typing import Any

import pytest
import torch
from quantized_models import install_quantizers
from thread_ranks import on_ranks
from torch import Tensor, nn

from hf_compress import TrainingError
from hf_compress.callbacks.step_sizes import StepSizes
from hf_compress.instruments.quantize import Quantized
from hf_compress.quantization.observers import MinMax, Mse

CPU = torch.device("cpu")
OBSERVED = {"scheme": "int8_static", "inputs": {"observer": "ema", "observer_options": {"momentum": 0.5}}}
LEARNED = {"method": "lsq_plus", "scheme": "int8_static"}
NAMES = ("first", "second")
RATE = 0.01


def layers() -> dict[str, nn.Linear]:
    made = {name: nn.Linear(4, 3, bias=False) for name in NAMES}
    with torch.no_grad():
        for index, layer in enumerate(made.values()):
            layer.weight.copy_(torch.linspace(-1.0 - index, 2.0, 12).view(3, 4))
    return made


def steps(config: dict[str, Any], rate: float | None = None) -> tuple[StepSizes, Quantized, dict[str, nn.Linear]]:
    made = layers()
    quantized = install_quantizers(made, **config)
    return StepSizes(quantized, CPU, rate), quantized, made


def batch(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, 8).view(2, 4)


def ranges(quantized: Quantized) -> list[tuple[float, float] | None]:
    return [
        tuple(float(end) for end in each.observer.range()) if each.observer.state else None  # type: ignore[misc]
        for each in quantized.observed().values()
    ]


def test_a_range_counts_all_micro_batches_as_one_step() -> None:
    sizes, quantized, made = steps(OBSERVED)
    assert sizes.missing() == ["first|inputs", "second|inputs"]
    sizes.collect()
    assert all(isinstance(each.collector, MinMax) for each in quantized.observed().values())
    made["first"](batch(-1.0, 1.0))
    made["first"](batch(0.0, 3.0))
    sizes.update(1.0)
    assert ranges(quantized) == [(-1.0, 3.0), None]
    assert sizes.missing() == ["second|inputs"]
    assert all(each.collector is None for each in quantized.observed().values())
    made["first"](batch(-9.0, 9.0))  # nobody watches
    sizes.update(1.0)
    assert ranges(quantized) == [(-1.0, 3.0), None]
    sizes.collect()
    made["first"](batch(-3.0, 5.0))
    sizes.update(1.0)
    assert ranges(quantized) == [(-2.0, 4.0), None]
    limits = quantized.layers[0].inputs.limits  # type: ignore[union-attr]
    assert [float(end) for end in limits] == [-2.0, 4.0]


def test_ranks_join_what_they_saw_and_who_saw_nothing_has_no_say() -> None:
    def watched(rank: int) -> Any:
        sizes, quantized, made = steps(OBSERVED)
        found: list[Any] = []
        for extremes in ([(-1.0, 2.0), (-4.0, 1.0)][rank], (-2.0, 2.0 + rank)):
            sizes.collect()
            sizes.update(1.0)  # a step in which nothing came anywhere
            assert sizes.missing() == ([] if found else ["first|inputs", "second|inputs"])
            sizes.collect()
            made["first"](batch(*extremes))
            if rank == 1 and not found:
                made["second"](batch(1.0, 6.0))  # of all ranks, in one step
            sizes.update(1.0)
            found.append(ranges(quantized))
        return found

    expected = [[(-4.0, 2.0), (1.0, 6.0)], [(-3.0, 2.5), (1.0, 6.0)]]
    assert on_ranks(watched) == [expected, expected]


def test_without_ranges_and_without_learning_an_update_does_nothing() -> None:
    def updated(rank: int) -> Any:
        sizes, quantized, made = steps({})  # a range per token, which nobody has to watch
        sizes.collect()
        made["first"](batch(0.0, 1.0))
        sizes.update(1.0)
        return sizes.missing(), sizes.state(), [each.collector for each in quantized.named().values()]

    assert on_ranks(updated) == [([], ({}, {"frozen": False}), [None] * 4)] * 2


def inputs_of(quantized: Quantized) -> list[Any]:
    return [layer.inputs for layer in quantized.layers]


def test_the_first_step_of_inputs_is_that_of_the_batches_of_all_ranks() -> None:
    alone, expected, made = steps(LEARNED, RATE)
    assert alone.missing() == ["first|inputs", "second|inputs"]
    assert set(alone.state()[0]) == {f"{of}/{name}|weights|step" for of in ("learned", "rate") for name in NAMES}
    alone.collect()
    assert all(isinstance(each.collector, Mse) for each in inputs_of(expected))
    assert all(layer.weights.collector is None for layer in expected.layers)  # type: ignore[union-attr]
    for name in NAMES:
        for extremes in ((-1.0, 2.0), (-3.0, 1.0)):
            made[name](batch(*extremes))
    alone.update(1.0)
    assert alone.missing() == []

    def watched(rank: int) -> Any:
        sizes, quantized, made = steps(LEARNED, RATE)
        sizes.collect()
        made["first"](batch(*((-1.0, 2.0), (-3.0, 1.0))[rank]))
        if rank == 1:
            made["second"](batch(-3.0, 1.0))
        sizes.update(1.0)
        first, second = inputs_of(quantized)
        # One rank has not reached the second layer: all go on counting.
        assert sizes.missing() == ["second|inputs"]
        assert first.collector is None and isinstance(second.collector, Mse)
        counting = second.collector
        sizes.collect()
        assert second.collector is counting
        if rank == 0:
            made["second"](batch(-1.0, 2.0))
        sizes.update(1.0)
        assert sizes.missing() == [] and second.collector is None
        return sizes.state()[0]

    first, second = on_ranks(watched)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    for key in (f"{of}/{name}|inputs|{what}" for of in ("learned", "rate") for name in NAMES for what in ("step",)):
        assert first[key] > 0
        torch.testing.assert_close(first[key], alone.state()[0][key])


def test_learned_tensors_move_by_a_rate_that_is_relative_to_the_first_step() -> None:
    sizes, quantized, made = steps(LEARNED, RATE)
    learned = quantized.learned()
    sizes.collect()
    for name in NAMES:
        made[name](batch(-1.0, 2.0))
    sizes.update(1.0)
    before = {
        f"{name}|{key}": tensor.detach().clone()
        for name, each in learned.items()
        for key, tensor in each.learned.items()
    }
    assert len(before) == 6  # a step and an offset of inputs, a step of weights, in each of two layers
    sizes.collect()
    assert all(each.collector is None for each in learned.values())
    for name in NAMES:
        made[name](batch(-1.0, 1.0)).square().sum().backward()
    assert all(tensor.grad is not None for each in learned.values() for tensor in each.learned.values())
    sizes.update(8.0)
    for name, each in learned.items():
        for key, tensor in each.learned.items():
            moved = (tensor.detach() - before[f"{name}|{key}"]).abs()
            torch.testing.assert_close(moved, RATE * before[f"{name}|step"], rtol=1e-3, atol=0.0)
            assert tensor.grad is None


def test_a_step_stays_positive() -> None:
    sizes, quantized, _ = steps({"method": "lsq", "inputs": False}, 10.0)
    for each in quantized.learned().values():
        each.learned["step"].grad = torch.ones_like(each.learned["step"])
    sizes.update(1.0)
    assert all(bool((each.learned["step"] > 0).all()) for each in quantized.learned().values())


def test_what_is_frozen_stays_as_it_is() -> None:
    sizes, quantized, made = steps(LEARNED, RATE)
    sizes.collect()
    made["first"](batch(-1.0, 2.0))
    sizes.update(1.0)
    sizes.collect()
    sizes.freeze()
    frozen, facts = sizes.state()
    assert facts == {"frozen": True}
    frozen = {name: tensor.clone() for name, tensor in frozen.items()}
    (first, second), learned = inputs_of(quantized), quantized.learned().values()
    assert first.is_snapped
    assert second.collector is None
    assert not any(tensor.requires_grad for each in learned for tensor in each.learned.values())
    sizes.collect()
    assert second.collector is None
    first.learned["step"].grad = torch.ones_like(first.learned["step"])
    sizes.update(1.0)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in sizes.state()[0].items())
    observing, quantized, made = steps(OBSERVED)
    observing.collect()
    made["first"](batch(-1.0, 2.0))
    observing.freeze()
    observing.collect()
    assert all(each.collector is None for each in quantized.observed().values())
    observing.update(1.0)
    assert ranges(quantized) == [None, None]


@pytest.mark.parametrize("config", [OBSERVED, LEARNED], ids=["observed", "learned"])
@pytest.mark.parametrize("frozen", [False, True])
def test_resumed_is_straight(config, frozen) -> None:
    rate = RATE if config is LEARNED else None

    def train(sizes: StepSizes, made: dict[str, nn.Linear], seeds: range) -> None:
        for seed in seeds:
            sizes.collect()
            for name in NAMES:
                made[name](batch(-1.0 - seed, 2.0 + seed)).square().sum().backward()
            sizes.update(1.0)

    straight, _, made = steps(config, rate)
    train(straight, made, range(3))
    if frozen:
        straight.freeze()
    tensors, facts = straight.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed, quantized, own = steps(config, rate)
    resumed.collect()
    resumed.restore(tensors, facts)
    assert config is OBSERVED or all(each.collector is None for each in quantized.named().values())
    assert resumed.state()[1] == facts
    assert resumed.missing() == []
    for sizes, layers_of in ((straight, made), (resumed, own)):
        train(sizes, layers_of, range(3, 5))
    first, second = straight.state()[0], resumed.state()[0]
    assert first.keys() == second.keys() == tensors.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], tensors[name])]
    assert bool(changed) == (not frozen)
    assert torch.equal(made["first"](batch(-5.0, 5.0)), own["first"](batch(-5.0, 5.0)))


def test_a_checkpoint_without_the_step_of_a_weight_is_refused() -> None:
    sizes, _, _ = steps(LEARNED, RATE)
    tensors, facts = sizes.state()
    del tensors["learned/second|weights|step"]
    with pytest.raises(TrainingError, match="the checkpoint holds no learned step of 'second'; resume with"):
        steps(LEARNED, RATE)[0].restore(tensors, facts)


def test_inputs_that_had_no_step_yet_have_none_after_resuming() -> None:
    sizes, _, _ = steps(LEARNED, RATE)
    resumed, quantized, made = steps(LEARNED, RATE)
    resumed.restore(*sizes.state())
    assert resumed.missing() == ["first|inputs", "second|inputs"]
    resumed.collect()
    made["first"](batch(-1.0, 2.0))
    resumed.update(1.0)
    assert resumed.missing() == ["second|inputs"]
    assert len(quantized.learned()["first|inputs"].learned) == 2
