import pytest
import torch

from hf_compress.config.formats import LayerFormats, TensorFormat
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
