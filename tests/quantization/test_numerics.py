import pytest
import torch
from row_numerics import EPS, dequantize, fake_quantize, integer_range, quantize, symmetric_scale
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def awkward(dtype: torch.dtype) -> Tensor:
    """Rows that a scale can go wrong on: zeros, constants, one sign only, outliers, tiny and large values."""
    x = torch.randn(40, 33, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x[1] = 0.3
    x[2] = x[2].abs()
    x[3] = -x[3].abs()
    x[4, 5] = 1e3
    x[5] *= 1e-5
    x[6] *= 1e4
    x[7] *= 1e-9  # below eps * 127.5
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 33), (5, 8, 33)], ids=str)
def test_scales_integers_and_values_are_bit_equal_to_torchao(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    x = awkward(dtype).reshape(shape)
    reference = torchao.Int8Tensor.from_hp(x, torchao.PerRow())
    scale = symmetric_scale(x)
    assert scale.dtype == reference.scale.dtype == torch.float32
    assert torch.equal(scale, reference.scale)
    assert torch.equal(quantize(x, scale), reference.qdata)
    assert torch.equal(dequantize(quantize(x, scale), scale, dtype), reference.dequantize())
    for covered in (False, True):
        simulated = fake_quantize(x, scale, covered=covered)
        assert simulated.dtype == dtype
        assert torch.equal(simulated, reference.dequantize())


def test_a_row_that_can_be_checked_by_hand() -> None:
    x = torch.tensor([[127.5, -127.5, 0.5, 1.5, -0.49]])
    scale = symmetric_scale(x)
    assert scale.tolist() == [[1.0]]
    assert quantize(x, scale).tolist() == [[127, -128, 0, 2, 0]]  # ties to even, 128 clipped to 127
    assert fake_quantize(x, scale).tolist() == [[127.0, -128.0, 0.0, 2.0, 0.0]]


def test_fewer_bits_use_a_smaller_range() -> None:
    assert (integer_range(8), integer_range(4), integer_range(2)) == ((-128, 127), (-8, 7), (-2, 1))
    x = torch.tensor([[7.5, -7.5, 1.2]])
    scale = symmetric_scale(x, num_bits=4)
    assert scale.tolist() == [[1.0]]
    assert quantize(x, scale, num_bits=4).tolist() == [[7, -8, 1]]


def test_zeros_get_the_smallest_scale_and_stay_zero() -> None:
    x = torch.zeros(2, 3)
    scale = symmetric_scale(x)
    assert scale.tolist() == [[pytest.approx(EPS)]] * 2
    assert torch.equal(fake_quantize(x, scale), x)


def test_gradient_passes_straight_through_inside_and_is_zero_outside() -> None:
    x = torch.tensor([-1000.0, -130.0, -128.4, -1.3, 0.0, 0.2, 127.4, 127.5, 130.0, 1000.0], requires_grad=True)
    upstream = torch.arange(1.0, 11.0)
    fake_quantize(x, torch.tensor([1.0])).backward(upstream)
    inside = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 0, 0])
    assert torch.equal(x.grad, upstream * inside)


def test_the_maximum_that_defines_the_scale_is_inside() -> None:
    x = awkward(torch.float32).requires_grad_()
    fake_quantize(x, symmetric_scale(x)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_covered_saves_the_mask_and_gives_the_same_gradient() -> None:
    gradients = []
    for covered in (False, True):
        x = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
        result = fake_quantize(x, symmetric_scale(x), covered=covered)
        assert len(result.grad_fn.saved_tensors) == (0 if covered else 1)
        (result**2).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_the_scale_is_a_constant_of_the_gradient() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert not symmetric_scale(x).requires_grad
