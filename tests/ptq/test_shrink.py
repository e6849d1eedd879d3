"""A calibrated model that is shrunk stays calibrated."""

from typing import Any

import pytest
import torch
from oneshot_models import batches, trained

from hf_compress import QuantizationConfig, calibrate, dimension_groups, shrink
from hf_compress.instruments.quantize import attached_quantizers
from hf_compress.quantization.granularity import PER_TENSOR

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def shrunk(model: Any, gone: list[int]) -> Any:
    group = next(group for group in dimension_groups(model) if group.kind == "ffn" and group.frozen is None)
    mask = torch.ones(group.num_units, dtype=torch.bool)
    mask[gone] = False
    return shrink(model, {group.name: mask})


def parameters(model: Any, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    layer = next(layer for layer in attached_quantizers(model).layers if layer.name == name)
    return layer.weights.parameters(layer.module.weight)


def test_steps_that_calibration_chose_follow_the_outputs() -> None:
    model = trained("llama")
    config = QuantizationConfig(
        method="ptq", scheme="int8_static", weights={"num_bits": 4}, options={"rounding": "gptq"}
    )
    calibrate(model, [{"input_ids": each["input_ids"]} for each in batches(2)], config)
    gone = [1, 5, 40]
    small = shrunk(model, gone)
    kept = [i for i in range(parameters(model, UP)[0].numel()) if i not in gone]
    assert torch.equal(parameters(small, UP)[0], parameters(model, UP)[0][kept])
    assert torch.equal(parameters(small, DOWN)[0], parameters(model, DOWN)[0])
    ranges = {layer.name: layer.inputs.parameters() for layer in attached_quantizers(model).layers}
    for layer in attached_quantizers(small).layers:
        assert layer.inputs.granularity == PER_TENSOR
        assert all(torch.equal(*pair) for pair in zip(layer.inputs.parameters(), ranges[layer.name], strict=True))
    weight = small.get_submodule(UP).weight
    integers = weight / parameters(small, UP)[0][:, None]
    assert torch.allclose(integers, integers.round(), atol=1e-3), "GPTQ's weights lie on the grid"


def test_groups_that_were_cut_get_ranges_of_their_own_again() -> None:
    model = trained("llama")
    config = QuantizationConfig(
        method="ptq", scheme="int4_weight_only", weights={"group_size": 4}, options={"rounding": "gptq"}
    )
    calibrate(model, [{"input_ids": each["input_ids"]} for each in batches(2)], config)
    with pytest.warns(UserWarning, match=r"calibrated steps of 1 layers \(first: 'model\.layers\.0\.mlp\.down_proj'\)"):
        small = shrunk(model, [0, 5, 10, 15])
    weight = small.get_submodule(DOWN).weight.detach().reshape(-1, 4)
    expected = torch.maximum(-weight.amin(1), weight.amax(1)) / 7.5
    torch.testing.assert_close(parameters(small, DOWN)[0], expected)


@pytest.mark.parametrize(
    "settings", [{"scheme": "int8_weight_only"}, {"weights": {"granularity": "tensor"}, "inputs": False}]
)
def test_shrinking_before_and_after_rounding_to_nearest_is_the_same(settings) -> None:
    """What is removed has no part in the steps, although it had when they were chosen."""
    model = trained("llama")
    gone = [1, 5, 40]
    with torch.no_grad():
        model.get_submodule(DOWN).weight[:, gone] = 5.0
        model.get_submodule(UP).weight[gone] = 5.0
    config = QuantizationConfig(method="ptq", **settings)
    first = shrunk(model, gone)
    calibrate(first, None, config)
    calibrate(model, None, config)
    after = shrunk(model, gone)
    for layer in attached_quantizers(first).layers:
        assert torch.equal(parameters(after, layer.name)[0], parameters(first, layer.name)[0]), layer.name
    assert parameters(model, DOWN)[0].max() > 5 * parameters(after, DOWN)[0].max()
