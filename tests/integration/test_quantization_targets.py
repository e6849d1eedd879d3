"""Embeddings, experts, attention and outputs of layers, quantized while a Trainer trains."""

import math
from functools import partial
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from hf_compress import QuantizationCallback, QuantizationConfig, export_quantized, preview
from hf_compress.instruments.quantize import attached_quantizers
from hf_compress.instruments.targets import oriented_weight
from hf_compress.quantization.quantizers import ObservedQuantizer, RangeQuantizer

mixtral = partial(tiny_models.mixtral, experts_implementation="eager", vocab_size=50)

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "experts": (mixtral, {"targets": ["linear", "embedding", "experts", "attention", "probabilities"]}),
    "observed attention": (
        partial(tiny_models.gpt2, vocab_size=50),
        {"targets": ["attention", "probabilities"], "scheme": "int8_static"},
    ),
    "learned": (
        partial(tiny_models.gpt2, vocab_size=50),
        {"targets": ["linear", "embedding"], "method": "lsq", "exclude": (), "weights": {"num_bits": 4}},
    ),
    "learned attention": (
        partial(tiny_models.gpt2, vocab_size=50),
        {
            "targets": ["attention", "probabilities"],
            "method": "lsq",
            "inputs": {"dynamic": False, "granularity": "tensor"},
        },
    ),
    "outputs": (partial(tiny_models.gpt2, vocab_size=50), {"outputs": {"num_bits": 8}}),
    "dynamic outputs": (
        partial(tiny_models.gpt2, vocab_size=50),
        {"outputs": {"dynamic": True, "granularity": "token"}},
    ),
}


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_it_trains_resumes_and_saves_plain_checkpoints(case, language_data, make_trainer, tmp_path) -> None:
    make, config = CASES[case]

    def trainer_of() -> Any:
        callback = QuantizationCallback(QuantizationConfig(**config, begin=1))
        model = make().train()
        return make_trainer(model, language_data(), [callback], save_strategy="steps", save_steps=1, max_steps=3)

    straight = trainer_of()
    assert math.isfinite(straight.train().training_loss)
    expected, quantized = weights_of(straight), attached_quantizers(straight.model)
    assert quantized.layers
    stored = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    make().save_pretrained(tmp_path / "plain")
    assert stored.keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()
    if case == "experts":  # a plain Trainer does not resume Mixtral bit for bit either
        return
    again = trainer_of()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    found = weights_of(again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert again.evaluate()["eval_loss"] == straight.evaluate()["eval_loss"]
    others = attached_quantizers(again.model).named()
    for name, quantizer in quantized.named().items():
        if not isinstance(quantizer, RangeQuantizer):
            assert torch.equal(quantizer.parameters()[0], others[name].parameters()[0])


def test_outputs_are_on_their_grid_observed_or_dynamic(language_data, make_trainer) -> None:
    for changes in ({}, {"dynamic": True}):
        model = tiny_models.gpt2(vocab_size=50)
        config = QuantizationConfig(outputs={"num_bits": 4, **changes}, inputs=False)
        trainer = make_trainer(model, language_data(), [QuantizationCallback(config)], max_steps=2)
        trainer.train()
        seen: dict[str, torch.Tensor] = {}
        layer = attached_quantizers(model).layers[0]
        assert isinstance(layer.outputs, RangeQuantizer if changes else ObservedQuantizer)
        layer.module.register_forward_hook(lambda module, args, y, seen=seen: seen.update(y=y))
        trainer.evaluate()
        values = seen["y"].unique()
        assert 8 < len(values) <= 16
        step = layer.outputs.parameters(seen["y"])[0] if not changes else values.diff().min()
        torch.testing.assert_close(values / step, (values / step).round(), rtol=0, atol=1e-3)


def test_preview_counts_tables_and_experts_once(language_data, make_trainer) -> None:
    model = tiny_models.gpt2(vocab_size=50)
    config = QuantizationConfig(targets=["linear", "embedding"], exclude=(), inputs=False)
    facts = preview(make_trainer(model, language_data(), [QuantizationCallback(config)])).sections["quantization"]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert facts["weights in them"] == sum(parameter.numel() for parameter in matrices)
    outputs = sum(
        p.shape[0] if "wte" in n or "wpe" in n else p.shape[1] for n, p in model.named_parameters() if p.dim() == 2
    )
    assert facts["bytes as integers"] == facts["weights in them"] + 4 * outputs


def test_tables_and_experts_are_exported_on_their_grid(language_data, make_trainer, tmp_path) -> None:
    model = mixtral()
    config = QuantizationConfig(
        targets=["embedding", "experts"], inputs=False, weights={"num_bits": 4, "granularity": "channel"}
    )
    trainer = make_trainer(model.train(), language_data(), [QuantizationCallback(config)], max_steps=2)
    trainer.train()
    export_quantized(model, tmp_path / "dense", format="dense")
    loaded = type(model).from_pretrained(tmp_path / "dense", experts_implementation="eager").eval()
    for layer in attached_quantizers(model).layers:
        path = layer.name if "experts" in layer.name else f"{layer.name}.weight"
        rows = loaded.get_parameter(path).detach().reshape(-1, loaded.get_parameter(path).shape[-1])
        steps = layer.weights.parameters(oriented_weight(layer.name, layer.module).detach())[0]
        torch.testing.assert_close(rows / steps[:, None], (rows / steps[:, None]).round(), rtol=0, atol=1e-4)
    ids = torch.arange(3, 11).view(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(Exception, match="format 'torchao' cannot store layer"):
        export_quantized(model, tmp_path / "int8", format="torchao")
