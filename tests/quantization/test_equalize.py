import numpy as np
import pytest
import torch
from torch import Tensor

from hf_compress.errors import ConfigError
from hf_compress.quantization.equalize import corrected_bias, equalizing_factors, smooth_factors
from hf_compress.quantization.grid import Grid
from hf_compress.quantization.rounding import round_to_nearest


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothing_is_equation_4_and_changes_no_output(alpha: float) -> None:
    x = values(30, 6) * torch.tensor([1.0, 50.0, 0.1, 1.0, 1.0, 8.0])
    weights = [values(4, 6, seed=1), values(5, 6, seed=2)]
    factors = smooth_factors(x.abs().amax(0), weights, alpha=alpha)
    for j in range(6):
        largest_input = max(abs(row[j]) for row in x.tolist())
        largest_weight = max(abs(row[j]) for weight in weights for row in weight.tolist())
        assert factors[j].item() == pytest.approx(largest_input**alpha / largest_weight ** (1 - alpha), rel=1e-5)
    for weight in weights:
        assert torch.allclose((x / factors) @ (weight * factors).T, x @ weight.T, rtol=1e-4, atol=1e-4)


def test_at_one_half_inputs_and_weights_become_equally_large() -> None:
    x, weight = values(30, 6) * 10, values(4, 6, seed=1)
    factors = smooth_factors(x.abs().amax(0), [weight])
    assert torch.allclose((x / factors).abs().amax(0), (weight * factors).abs().amax(0), rtol=1e-5)


def test_dead_inputs_keep_a_factor_of_one() -> None:
    weight = values(4, 3)
    weight[:, 1] = 0.0
    assert smooth_factors(torch.tensor([0.0, 2.0, 3.0]), [weight])[:2].tolist() == [1.0, 1.0]
    for alpha in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="alpha"):
            smooth_factors(torch.ones(3), [weight], alpha=alpha)
    with pytest.raises(ConfigError, match="0 weights"):
        smooth_factors(torch.ones(3), [])


def test_equalization_makes_both_ranges_equal_and_changes_no_output() -> None:
    first, bias, second = values(6, 4), values(6), values(3, 6, seed=1) * torch.tensor([10, 1, 0.1, 1, 5, 1])
    factors = equalizing_factors(first, second)
    equal = (first / factors[:, None], bias / factors, second * factors)
    rows, columns = equal[0].abs().amax(1), equal[2].abs().amax(0)
    assert torch.allclose(rows, columns, rtol=1e-5)
    assert torch.allclose(rows, (first.abs().amax(1) * second.abs().amax(0)).sqrt(), rtol=1e-5)
    x = values(20, 4, seed=2)
    before = torch.relu(x @ first.T + bias) @ second.T
    assert torch.allclose(torch.relu(x @ equal[0].T + equal[1]) @ equal[2].T, before, atol=1e-4)
    first[2], second[:, 4] = 0.0, 0.0
    assert equalizing_factors(first, second)[[2, 4]].tolist() == [1.0, 1.0]


def test_equalization_lowers_the_rounding_error_of_uneven_rows() -> None:
    first = values(16, 12) * torch.logspace(-2, 1, 16)[:, None]
    second = values(8, 16, seed=1)
    factors = equalizing_factors(first, second)

    def error(one: Tensor, other: Tensor) -> float:
        rounded = []
        for weight in (one, other):  # per tensor: a single row
            flat = round_to_nearest(weight.reshape(1, -1), Grid(num_bits=6)).weight
            rounded.append(flat.view_as(weight))
        return float((rounded[1] @ rounded[0] - other @ one).norm())

    assert error(first / factors[:, None], second * factors) < 0.8 * error(first, second)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_corrected_bias_gives_back_the_mean_output(with_bias: bool) -> None:
    x, weight = values(500, 8) + 2.0, values(5, 8, seed=1)
    bias = values(5, seed=2) if with_bias else None
    rounded = round_to_nearest(weight, Grid(num_bits=3)).weight
    corrected = corrected_bias(weight, rounded, x.mean(0), bias)
    wanted = (x @ weight.T + (0 if bias is None else bias)).double().mean(0)
    np.testing.assert_allclose((x @ rounded.T + corrected).double().mean(0), wanted, atol=1e-4)
    assert not np.allclose((x @ rounded.T + (0 if bias is None else bias)).double().mean(0), wanted, atol=1e-2)
    assert corrected_bias(weight.bfloat16(), rounded.bfloat16(), x.mean(0)).dtype == torch.bfloat16
