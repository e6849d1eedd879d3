import numpy as np
import pytest
import torch
from torch import Tensor

from hf_compress.errors import ConfigError
from hf_compress.quantization.dorefa import dorefa_activation, dorefa_gradient, dorefa_weight


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantize_k(r: np.ndarray, k: int) -> np.ndarray:
    return np.round((2**k - 1) * r) / (2**k - 1)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_weights_are_equation_9(k: int) -> None:
    weight = values(5, 12)
    bounded = np.tanh(weight.numpy())
    expected = 2 * quantize_k(bounded / (2 * np.abs(bounded).max()) + 0.5, k) - 1
    result = dorefa_weight(weight, k)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)
    steps = (result * (2**k - 1)).round()
    assert bool((steps.abs() % 2 == 1).all())  # odd multiples of 1 / (2^k - 1)
    assert result.abs().max().item() == pytest.approx(1.0)


def test_the_gradient_of_weights_is_that_without_rounding() -> None:
    weight, upstream = values(5, 12).double(), values(5, 12, seed=1).double()
    gradients = []
    for function in (lambda w: dorefa_weight(w, 4), lambda w: w.tanh() / w.tanh().abs().max()):
        leaf = weight.clone().requires_grad_()
        function(leaf).backward(upstream)
        gradients.append(leaf.grad)
    assert torch.allclose(*gradients, atol=1e-12)


def test_removed_weights_do_not_touch_the_others() -> None:
    weight = values(5, 12)
    weight[:, 3] = 50.0
    keep = torch.arange(12) != 3
    assert torch.equal(dorefa_weight(weight, 3, keep)[:, keep], dorefa_weight(weight[:, keep], 3))
    assert not torch.equal(dorefa_weight(weight, 3)[:, keep], dorefa_weight(weight[:, keep], 3))
    assert torch.isfinite(dorefa_weight(torch.zeros(2, 2), 3)).all()


@pytest.mark.parametrize("k", [2, 5])
def test_activations_are_clipped_to_one_and_rounded(k: int) -> None:
    x = torch.tensor([-0.5, -0.01, 0.1, 0.4, 0.77, 1.01, 3.0], requires_grad=True)
    result = dorefa_activation(x, k)
    np.testing.assert_allclose(result.detach(), quantize_k(np.clip(x.detach().numpy(), 0, 1), k), atol=1e-6)
    result.backward(torch.arange(1.0, 8.0))
    assert x.grad.tolist() == [0.0, 0.0, 3.0, 4.0, 5.0, 0.0, 0.0]


@pytest.mark.parametrize("k", [2, 4])
def test_gradients_are_rounded_to_the_levels_of_each_example(k: int) -> None:
    x, upstream = values(3, 7, 5).requires_grad_(), values(3, 7, 5, seed=1)
    upstream[1] *= 100.0
    result = dorefa_gradient(x, k, torch.Generator().manual_seed(0))
    assert torch.equal(result, x)
    result.backward(upstream)
    largest = upstream.abs().amax((1, 2), keepdim=True)
    steps = (x.grad / (2 * largest) + 0.5) * (2**k - 1)
    assert torch.allclose(steps, steps.round(), atol=1e-3) and steps.min() > -0.01 and steps.max() < 2**k - 0.99
    assert bool(((x.grad - upstream).abs() <= 2 * largest / (2**k - 1) * 1.001).all())  # to one of two neighbors


def test_gradients_are_right_on_average_and_the_generator_decides() -> None:
    upstream = torch.tensor([[1.0, -0.3, 0.05, 0.6]]).expand(40_000, 4)
    gradients = []
    for seed in (0, 0, 1):
        x = torch.zeros(40_000, 4, requires_grad=True)
        dorefa_gradient(x, 2, torch.Generator().manual_seed(seed)).backward(upstream)
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])
    # The end of the range is clipped on one side; all else is exact on average, to about five standard errors.
    assert torch.allclose(gradients[0].mean(0)[1:], upstream[0, 1:], atol=5 * (2 / 3) / 2 / 200)
    flat = torch.zeros(5, requires_grad=True)
    dorefa_gradient(flat, 4).backward(torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5]))
    assert flat.grad.tolist() == pytest.approx([0.0, 1.0, -2.0, 3.0, 0.5])  # each example is its own maximum


@pytest.mark.parametrize("num_bits", [1, 9, True, 4.0])
def test_other_numbers_of_bits_are_refused(num_bits: int) -> None:
    for function in (dorefa_weight, dorefa_activation, dorefa_gradient):
        with pytest.raises(ConfigError, match="num_bits"):
            function(values(2, 2), num_bits)
