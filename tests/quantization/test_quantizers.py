import pytest
import torch

from hf_compress.config.formats import LayerFormats, TensorFormat
from hf_compress.errors import TargetError
from hf_compress.quantization.methods import Method
from hf_compress.quantization.quantizers import Quantizer
from hf_compress.registry import quantization_methods, schemes


def method(name: str, **options) -> Method:
    kind = quantization_methods.get(name)
    return kind(kind.options.from_dict(options))


def int8_dynamic() -> tuple[Quantizer, Quantizer]:
    formats: LayerFormats = schemes.get("int8_dynamic")
    return method("qat").weight(formats.weights), method("qat").activation(formats.inputs)


def on_grid(quantizer: Quantizer, x: torch.Tensor, removed: torch.Tensor | None = None) -> torch.Tensor:
    return quantizer.fake_quantize(x, removed, quantizer.prepare(x, removed))


def test_the_weight_of_a_layer_is_bit_equal_to_what_torchao_makes_of_it() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Linear(33, 40)
    weight = layer.weight.detach().clone()
    quantizer, _ = int8_dynamic()
    torchao.quantize_(layer, torchao.Int8DynamicActivationInt8WeightConfig())
    assert torch.equal(layer.weight.scale.flatten(), quantizer.parameters(weight)[0])
    assert torch.equal(layer.weight.dequantize(), on_grid(quantizer, weight))


def test_removed_channels_do_not_touch_the_scale_of_the_others() -> None:
    weight = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    weight[:, 3] = 50.0  # the largest of every row
    removed = torch.zeros(1, 10, dtype=torch.bool)
    removed[0, [3, 8]] = True
    kept = (~removed[0]).nonzero().flatten()
    quantizer, _ = int8_dynamic()
    scale = quantizer.prepare(weight, removed)[0]
    assert torch.equal(scale, quantizer.prepare(weight[:, kept], None)[0])
    assert not torch.equal(scale, quantizer.prepare(weight, None)[0])
    assert torch.equal(on_grid(quantizer, weight, removed)[:, kept], on_grid(quantizer, weight[:, kept]))


def test_every_token_has_its_own_input_scale() -> None:
    x = torch.tensor([[[1.0, -2.0]], [[100.0, 50.0]]])
    _, quantizer = int8_dynamic()
    both = on_grid(quantizer, x)
    assert torch.equal(both[:1], on_grid(quantizer, x[:1]))
    assert torch.equal(both[1:], on_grid(quantizer, x[1:]))


def test_a_format_starts_from_its_scheme() -> None:
    start: LayerFormats = schemes.get("int8_dynamic")
    changed = start.changed("test", {"weights": {"num_bits": 4, "granularity": "group", "group_size": 16}})
    assert changed.weights == TensorFormat(num_bits=4, granularity="group", group_size=16)
    assert changed.inputs == start.inputs
    assert start.changed("test", {"inputs": False}).inputs is None


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [{"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 8}])
def test_weights_have_as_many_values_as_their_bits_allow(num_bits, symmetric, granularity) -> None:
    if "group_size" in granularity:
        granularity = {"granularity": "group", **granularity}
    wanted = TensorFormat(num_bits=num_bits, symmetric=symmetric, **granularity)
    quantizer = method("qat").weight(wanted)
    weight = normal(4, 32) + (0.0 if symmetric else 1.0)
    values = on_grid(quantizer, weight)
    blocks = quantizer.granularity.blocks(values)
    scale, zero_point = quantizer.parameters(weight)
    assert len(scale) == {"tensor": 1, "channel": 4, "group": 16}[wanted.granularity]
    integers = blocks / scale[:, None] + (0 if zero_point is None else zero_point[:, None])
    assert torch.allclose(integers, integers.round(), atol=1e-4)
    assert integers.round().min() >= -(2 ** (num_bits - 1))
    assert integers.round().max() <= 2 ** (num_bits - 1) - 1
    assert integers.round().max() - integers.round().min() >= 2 ** (num_bits - 1)
    half_a_step = scale[:, None] * (1.0 if symmetric else 0.51)  # the largest value of a symmetric grid may be clipped
    assert ((blocks - quantizer.granularity.blocks(weight)).abs() <= half_a_step).all()


def test_a_searched_range_rounds_better_than_the_whole_one() -> None:
    weight = normal(1, 4000)
    weight[0, 0] = 30.0

    def error(observer: str, **options) -> float:
        wanted = TensorFormat(num_bits=4, granularity="channel", observer=observer, observer_options=options)
        return float((on_grid(method("qat").weight(wanted), weight) - weight)[0, 1:].square().mean())

    assert error("percentile", percentile=99.9) < 0.2 * error("min_max")
    assert error("mse") < error("min_max")


def observed() -> Quantizer:
    return method("qat").activation(TensorFormat(symmetric=False))


def test_an_observed_range_is_asked_for_before_there_is_one() -> None:
    with pytest.raises(TargetError, match="has no range yet"):
        on_grid(observed(), normal(3, 4))


def test_an_observed_range_stays_whatever_comes() -> None:
    quantizer = observed()
    quantizer.observer.observe(torch.tensor([-1.0, 3.0]))
    quantizer.settle()
    scale, zero_point = quantizer.parameters()
    assert scale.tolist() == [pytest.approx(4 / 255)]
    assert zero_point.tolist() == [-128 - round(-1 / (4 / 255))]
    values = on_grid(quantizer, torch.tensor([[-50.0, 0.0, 1.0, 50.0]]))[0]
    assert values[0] == pytest.approx(-1.0, abs=4 / 255)
    assert values[1] == 0
    assert values[2] == pytest.approx(1.0, abs=4 / 255)
    assert values[3] == pytest.approx(3.0, abs=4 / 255)
    other = observed()
    other.load(quantizer.state())
    assert all(torch.equal(*pair) for pair in zip(other.parameters(), quantizer.parameters(), strict=True))


def test_learned_steps_begin_as_in_the_paper_and_get_the_papers_gradient() -> None:
    weight = normal(4, 16)
    quantizer = method("lsq").weight(TensorFormat(num_bits=4, granularity="channel"))
    quantizer.initialize(weight)
    step = quantizer.learned["step"]
    assert torch.allclose(step, 2 * weight.abs().mean(1) / 7**0.5)
    upstream = normal(4, 16)
    on_grid(quantizer, weight).backward(upstream)
    v = weight / step.detach()[:, None]
    slope = torch.where(v <= -8, -8.0, torch.where(v >= 7, 7.0, v.round() - v))
    expected = (upstream * slope).sum(1) / (16 * 7) ** 0.5
    assert torch.allclose(step.grad, expected, atol=1e-5)


def test_the_gradient_of_an_inputs_step_is_scaled_by_its_features() -> None:
    x = normal(5, 3, 16)
    quantizer = method("lsq").activation(TensorFormat(num_bits=4))
    quantizer.load({"step": torch.tensor([0.3])})
    on_grid(quantizer, x).sum().backward()
    v = x / 0.3
    slope = torch.where(v <= -8, -8.0, torch.where(v >= 7, 7.0, v.round() - v))
    assert quantizer.learned["step"].grad.item() == pytest.approx(float(slope.sum() / (16 * 7) ** 0.5), rel=1e-4)


def test_a_learned_offset_becomes_a_zero_point() -> None:
    quantizer = method("lsq_plus").activation(TensorFormat(num_bits=8, symmetric=False))
    quantizer.load({"step": torch.tensor([0.1]), "offset": torch.tensor([3.17])})
    quantizer.snap()
    scale, zero_point = quantizer.parameters()
    assert zero_point.tolist() == [-32]
    assert quantizer.learned["offset"].item() == pytest.approx(3.2)
    values = on_grid(quantizer, normal(4, 4) + 3)
    integers = values / scale + zero_point
    assert torch.allclose(integers, integers.round(), atol=1e-4)
    assert on_grid(quantizer, torch.zeros(1, 1)).item() == 0


def test_binary_weights_are_signs_of_one_magnitude_a_channel() -> None:
    weight = normal(4, 16)
    wanted = TensorFormat(num_bits=1, granularity="channel")
    values = on_grid(method("bnn").weight(wanted), weight)
    assert torch.allclose(values, weight.sign() * weight.abs().mean(1, keepdim=True))
    assert set(on_grid(method("bnn", scaled=False).weight(wanted), weight).unique().tolist()) == {-1.0, 1.0}


def test_dorefa_weights_have_their_magnitude_back_unless_told_otherwise() -> None:
    weight = normal(4, 16) * 0.02
    wanted = TensorFormat(num_bits=4)
    plain = on_grid(method("dorefa", scaled=False).weight(wanted), weight)
    assert plain.abs().max() == 1
    scaled = on_grid(method("dorefa").weight(wanted), weight)
    assert torch.allclose(scaled, plain * weight.abs().max())
    assert (scaled - weight).abs().max() < weight.abs().max() / 15 * 1.1
    assert len(scaled.unique()) <= 16


def test_methods_without_integers_have_no_parameters() -> None:
    quantizer = method("dorefa").weight(TensorFormat(num_bits=4))
    assert quantizer.grid is None
    assert quantizer.num_bits == 4
    with pytest.raises(TargetError, match="no integer grid"):
        quantizer.parameters(normal(2, 2))


def test_a_dynamic_input_beside_learned_weights_has_its_observers_options() -> None:
    x = normal(4, 1000)

    def step(percentile: float) -> float:
        wanted = TensorFormat(dynamic=True, observer="percentile", observer_options={"percentile": percentile})
        return float(method("lsq").activation(wanted).parameters(x)[0])

    assert step(60) < 0.5 * step(99.9)


def test_a_snapped_quantizer_computes_what_is_stored() -> None:
    quantizer = method("lsq_plus").activation(TensorFormat(num_bits=8, symmetric=False))
    quantizer.load({"step": torch.tensor([0.1]), "offset": torch.tensor([3.17])})
    quantizer.snap()
    x = normal(50, 50) * 5
    scale, zero_point = quantizer.parameters()
    stored = ((x.mul(1 / scale).round() + zero_point).clamp(-128, 127) - zero_point) * scale
    assert torch.equal(on_grid(quantizer, x), stored)


def test_an_image_has_as_many_features_as_numbers() -> None:
    image = normal(2, 3, 4, 4)
    quantizer = method("lsq").activation(TensorFormat(num_bits=4))
    gradients = []
    for x in (image, image.reshape(2, 48)):
        quantizer.load({"step": torch.tensor([0.3])})
        on_grid(quantizer, x).sum().backward()
        gradients.append(quantizer.learned["step"].grad.item())
    assert gradients[0] == pytest.approx(gradients[1])
