"""What becomes of fake quantizers when a model shrinks."""

from typing import Any

import pytest
import tiny_models
import torch
from quantized_models import fake_quantized_modules
from transformers import PreTrainedModel

from hf_compress import QuantizationConfig, dimension_groups, enable_quantizers, export_quantized, shrink
from hf_compress.errors import ShrinkError
from hf_compress.instruments.fake_quantize import quantizable_layers
from hf_compress.instruments.quantize import Quantized, attached_quantizers, make_quantizers
from hf_compress.quantization.quantizers import LearnedQuantizer, ObservedQuantizer


def quantize(model: PreTrainedModel, **config: Any) -> Quantized:
    settings = QuantizationConfig(**config)
    quantized = make_quantizers(settings, quantizable_layers(model, settings.exclude, settings.targets))
    for layer in quantized.weighted():
        if isinstance(layer.weights, LearnedQuantizer):
            blocks = layer.weights.granularity.num_blocks(layer.module.weight.t().shape) if _conv1d(layer) else None
            count = blocks or layer.weights.granularity.num_blocks(layer.module.weight.shape)
            layer.weights.load({"step": torch.linspace(0.01, 0.02, count)})
        if isinstance(layer.inputs, ObservedQuantizer):
            layer.inputs.observer.observe(torch.tensor([-3.0, 2.0]))
            layer.inputs.settle()
    quantized.install()
    return quantized


def _conv1d(layer: Any) -> bool:
    return type(layer.module).__name__.endswith("Conv1D")


def mask_of(model: PreTrainedModel, kind: str, gone: list[int]) -> dict[str, torch.Tensor]:
    group = next(g for g in dimension_groups(model) if g.kind == kind and g.frozen is None)
    mask = torch.ones(group.num_units, dtype=torch.bool)
    mask[gone] = False
    return {group.name: mask}


def steps(model: PreTrainedModel, name: str) -> torch.Tensor:
    return attached_quantizers(model).named()[f"{name}|weights"].parameters()[0]


UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def test_steps_per_channel_follow_the_outputs_that_stay() -> None:
    model = tiny_models.llama()
    quantize(model, method="lsq")
    before, gone = steps(model, UP), [0, 7, 43]
    small = shrink(model, mask_of(model, "ffn", gone))
    kept = [i for i in range(44) if i not in gone]
    assert torch.equal(steps(small, UP), before[kept])
    assert torch.equal(steps(small, DOWN), steps(model, DOWN))
    assert torch.equal(steps(model, UP), before), "the original has lost steps"
    assert fake_quantized_modules(small) == fake_quantized_modules(model)


def test_fused_and_transposed_weights_follow_too() -> None:
    model = tiny_models.gpt2()
    quantize(model, method="lsq")
    before = steps(model, "transformer.h.0.attn.c_attn")
    small = shrink(model, mask_of(model, "heads", [1]))
    kept = [i for i in range(96) if i % 32 not in range(8, 16)]
    assert torch.equal(steps(small, "transformer.h.0.attn.c_attn"), before[kept])


def test_experts_and_their_channels_follow() -> None:
    model = tiny_models.mixtral()
    settings = QuantizationConfig(method="lsq", targets=["experts"], inputs=False)
    quantized = make_quantizers(settings, quantizable_layers(model, None, ("experts",)))
    for layer in quantized.layers:
        assert isinstance(layer.weights, LearnedQuantizer)
        weight = model.get_parameter(layer.name)
        layer.weights.load({"step": torch.linspace(0.01, 0.02, weight.shape[0] * weight.shape[1])})
    quantized.install()
    name = "model.layers.0.mlp.experts.down_proj"
    before = steps(model, name).view(model.get_parameter(name).shape[:2])
    assert torch.equal(steps(shrink(model, mask_of(model, "experts", [1])), name), before[[0, 2]].flatten())
    hidden = shrink(model, mask_of(model, "hidden", list(range(4))))
    assert torch.equal(steps(hidden, name), before[:, 4:].flatten())


def test_observed_ranges_stay_and_so_does_what_is_per_tensor() -> None:
    model = tiny_models.llama()
    quantize(model, scheme="int8_static")
    small = shrink(model, mask_of(model, "ffn", [1, 2]))
    for name, quantizer in attached_quantizers(small).observed().items():
        found = attached_quantizers(model).observed()[name]
        assert quantizer is not found
        assert torch.equal(quantizer.parameters()[0], found.parameters()[0])
        assert torch.equal(quantizer.parameters()[1], found.parameters()[1])


def test_layers_that_go_lose_theirs_and_the_others_move_up() -> None:
    model = tiny_models.llama(num_hidden_layers=3)
    quantize(model, method="lsq", weights={"granularity": "channel"})
    second = attached_quantizers(model).named()["model.layers.2.mlp.up_proj|weights"]
    second.load({"step": torch.linspace(0.5, 0.6, 44)})
    small = shrink(model, mask_of(model, "layers", [1]))
    assert len(attached_quantizers(small).layers) == 2 * 7
    assert torch.equal(steps(small, "model.layers.1.mlp.up_proj"), second.parameters()[0])


def test_whole_groups_keep_their_steps() -> None:
    model = tiny_models.llama()
    quantize(model, method="lsq", inputs=False, weights={"granularity": "group", "group_size": 4})
    before = steps(model, DOWN).view(32, 11)
    small = shrink(model, mask_of(model, "ffn", [*range(4, 8), *range(40, 44)]))
    assert torch.equal(steps(small, DOWN), before[:, [0, *range(2, 10)]].flatten())


def test_groups_that_were_cut_are_computed_again_with_a_warning() -> None:
    model = tiny_models.llama()
    quantize(model, method="lsq", inputs=False, weights={"granularity": "group", "group_size": 4})
    with pytest.warns(UserWarning, match=r"steps of 1 layers \(first: 'model\.layers\.0\.mlp\.down_proj'\)"):
        small = shrink(model, mask_of(model, "ffn", [0, 5, 10, 15]))
    weight = small.get_parameter(f"{DOWN}.weight").view(32, -1, 4)
    expected = 2 * weight.abs().mean(-1) / 127**0.5
    torch.testing.assert_close(steps(small, DOWN).view_as(expected), expected.detach())


def test_groups_that_no_longer_divide_raise() -> None:
    model = tiny_models.llama()
    quantize(model, scheme="int4_weight_only", weights={"group_size": 4})
    with pytest.raises(ShrinkError, match=r"down_proj' cannot stay quantized as it is: .* multiple_of=size"):
        shrink(model, mask_of(model, "ffn", [0]))
    small = shrink(model, mask_of(model, "ffn", list(range(5))), multiple_of=4)
    assert fake_quantized_modules(small) == fake_quantized_modules(model)


def test_without_quantizers_it_is_plain() -> None:
    model = tiny_models.llama()
    quantize(model)
    assert fake_quantized_modules(shrink(model, mask_of(model, "ffn", [0]), quantizers=False)) == []


def test_a_tied_weight_still_has_one_quantizer_and_exports_its_steps(tmp_path) -> None:
    model = tiny_models.gpt2()
    config = {"method": "lsq", "inputs": False, "targets": ["linear", "embedding"], "exclude": ()}
    quantize(model, **config)
    small = shrink(model, mask_of(model, "hidden", [0, 1]))
    found = attached_quantizers(small)
    named = {layer.name: layer.weights for layer in found.layers}
    assert named["transformer.wte"] is named["lm_head"]
    assert len(steps(small, "transformer.wte")) == small.config.vocab_size
    export_quantized(small, tmp_path, format="dense", exclude=())
    loaded = type(small).from_pretrained(tmp_path)
    weight = loaded.transformer.wte.weight
    ratio = weight / steps(small, "transformer.wte")[:, None]
    torch.testing.assert_close(ratio, ratio.round(), rtol=0, atol=1e-3)
    assert ratio.round().unique().numel() > 20


def test_it_can_be_shrunk_again() -> None:
    model = tiny_models.llama()
    quantize(model, method="lsq")
    once = shrink(model, mask_of(model, "ffn", [0]))
    twice = shrink(once, mask_of(once, "ffn", [0]))
    assert torch.equal(steps(twice, UP), steps(model, UP)[2:])


def test_the_small_model_computes_what_it_will_when_it_is_loaded_again(tmp_path) -> None:
    """Quantizers are there and do not act, until they are asked to or an export stores them."""
    model = tiny_models.bert()
    quantize(model, method="lsq", weights={"num_bits": 4})
    small = shrink(model, mask_of(model, "ffn", [0, 1]))
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    ids = {"input_ids": torch.arange(3, 13)[None]}
    with torch.no_grad():
        plain = small(**ids).logits
        assert torch.equal(again(**ids).logits, plain)
        enable_quantizers(small)
        assert not torch.equal(small(**ids).logits, plain)
        enable_quantizers(small, False)
        assert torch.equal(small(**ids).logits, plain)
    assert export_quantized(small, tmp_path / "dense", format="dense").is_dir()
