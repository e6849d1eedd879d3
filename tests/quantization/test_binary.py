import numpy as np
import pytest
import torch
from torch import Tensor

from hf_compress.quantization.binary import binarize
from hf_compress.quantization.granularity import PER_TENSOR, per_channel, per_group


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_sign_and_its_straight_through_gradient() -> None:
    x = torch.tensor([-3.0, -1.0, -0.2, -0.0, 0.0, 0.5, 1.0, 1.01], requires_grad=True)
    result = binarize(x)
    assert result.tolist() == [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    result.backward(torch.arange(1.0, 9.0))
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 0.0]


@pytest.mark.parametrize("granularity", [PER_TENSOR, per_channel(0), per_group(4)], ids=str)
def test_the_scale_is_the_one_with_the_least_squared_error(granularity) -> None:
    x = values(3, 8)
    result = binarize(x, scaled=True, granularity=granularity)
    blocks, binary = granularity.blocks(x).double().numpy(), granularity.blocks(result).double().numpy()
    for block, found in zip(blocks, binary, strict=True):
        signs = np.sign(block)
        best = np.linalg.lstsq(signs[:, None], block, rcond=None)[0][0]
        np.testing.assert_allclose(found, best * signs, rtol=1e-5)


def test_the_scaled_gradient_is_that_of_the_product() -> None:
    x, upstream = values(3, 8), values(3, 8, seed=1)
    leaf = x.clone().requires_grad_()
    binarize(leaf, scaled=True, granularity=per_channel(0)).backward(upstream)
    for i in range(3):
        row, g = x[i].double().numpy(), upstream[i].double().numpy()
        scale, signs = np.abs(row).mean(), np.sign(row)
        expected = g * scale * (np.abs(row) <= 1) + (g @ signs) * signs / 8
        np.testing.assert_allclose(leaf.grad[i].numpy(), expected, atol=1e-6)


def test_removed_channels_do_not_touch_the_scale() -> None:
    x = values(3, 8)
    x[:, 2] = 100.0
    keep = (torch.arange(8) != 2)[None]
    for granularity in (PER_TENSOR, per_channel(0)):
        small = binarize(x[:, keep[0]], scaled=True, granularity=granularity)
        masked = binarize(x, scaled=True, granularity=granularity, keep=keep)
        assert torch.allclose(masked[:, keep[0]], small, rtol=1e-6)
    assert binarize(x.to(torch.bfloat16), scaled=True).dtype == torch.bfloat16
