"""Quantization on a GPU: the same numbers as on the CPU, and nothing waits for the device."""

from collections.abc import Iterator

import pytest
import torch
from oneshot_models import batches, for_language, trained
from torch import Tensor

from hf_compress import QuantizationConfig, apply_calibration_config, calibrate, calibration_config
from hf_compress.quantization.fake import fake_quantize, to_integers
from hf_compress.quantization.granularity import PER_TENSOR, Granularity, per_channel, per_group
from hf_compress.quantization.grid import Grid
from hf_compress.quantization.lsq import initial_step, learned_step
from hf_compress.quantization.observers import observers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def values(seed: int = 0) -> Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("granularity", [PER_TENSOR, per_channel(0), per_channel(-1), per_group(32)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", observers)
def test_observers_see_on_the_gpu_what_they_see_on_the_cpu(
    name: str, symmetric: bool, granularity: Granularity
) -> None:
    grid = Grid(symmetric=symmetric)
    here, there = (observers.get(name)(grid, granularity) for _ in range(2))
    keep = torch.arange(128) % 7 != 0
    on_gpu = [(values(seed).cuda(), keep.cuda()) for seed in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, kept in on_gpu:
            there.observe(x, kept)
        found = grid.parameters(*there.range())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in range(2):
        here.observe(values(seed), keep)
    for key, tensor in here.state.items():
        assert torch.equal(there.state[key].cpu(), tensor)
    torch.testing.assert_close(found[0].cpu(), grid.parameters(*here.range())[0])
    here.load(there.state)
    here.observe(values(3))  # a state from the GPU goes on where the values are


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_that_of_the_cpu(symmetric: bool) -> None:
    grid, x = Grid(num_bits=4, symmetric=symmetric), values()
    scale, zero_point = grid.parameters(x.amin(1, keepdim=True), x.amax(1, keepdim=True))
    given = [None if each is None else each.cuda() for each in (scale, zero_point)]
    assert torch.equal(to_integers(x.cuda(), grid, *given).cpu(), to_integers(x, grid, scale, zero_point))


@pytest.mark.usefixtures("no_waiting")
def test_training_steps_wait_for_nothing() -> None:
    grid, x = Grid(num_bits=4), torch.randn(64, 128, device="cuda", requires_grad=True)
    step = initial_step(x, grid)[:, None].requires_grad_()
    (learned_step(x, grid, step) + fake_quantize(x, grid, step.detach())).sum().backward()
    assert x.grad is not None and step.grad is not None


def test_calibration_on_the_gpu_finds_what_the_cpu_finds() -> None:
    data = for_language(batches(2))
    options = {"rounding": "gptq", "smooth": 0.5, "equalize": True}
    config = QuantizationConfig(method="ptq", scheme="int8_static", options=options)
    here, there = trained("llama"), trained("llama").cuda()
    calibrate(here, data, config)
    calibrate(there, data, config)
    stored = calibration_config(there)
    for name, layer in calibration_config(here)["layers"].items():
        expected = torch.tensor(layer["inputs"]["scale"])
        torch.testing.assert_close(torch.tensor(stored["layers"][name]["inputs"]["scale"]), expected, rtol=1e-3, atol=0)
    fresh = trained("llama")
    fresh.load_state_dict(there.state_dict())
    apply_calibration_config(fresh.cuda(), stored)
    inputs = data[0]["input_ids"].cuda()
    with torch.no_grad():
        assert torch.equal(fresh.eval()(inputs).logits, there.eval()(inputs).logits)
