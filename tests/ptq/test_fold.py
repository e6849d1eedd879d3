"""Channels are scaled only where the function stays what it is."""

from typing import Any

import pytest
import tiny_models
import torch
from oneshot_models import Snapshot
from torch import nn

from hf_compress import QuantizationConfig, TargetError, calibrate, make_example_inputs
from hf_compress.graph.capture import main_outputs
from hf_compress.oneshot.linear import Undo
from hf_compress.ptq.fold import FoldFinder, check_unchanged


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]


def found(model: nn.Module, *, norms: bool) -> dict[str, set[str]]:
    folds = FoldFinder(model.eval()).find(linears(model), norms=norms)
    return {fold.name: {reader.name for reader in fold.readers} for fold in folds}


def test_norms_and_who_reads_them() -> None:
    layers = "model.layers.{}.{}"
    expected = {}
    for i in range(2):
        attention = {layers.format(i, f"self_attn.{part}_proj") for part in "qkv"}
        expected[layers.format(i, "input_layernorm")] = attention
        expected[layers.format(i, "post_attention_layernorm")] = {
            layers.format(i, f"mlp.{part}_proj") for part in ("gate", "up")
        }
    expected["model.norm"] = {"lm_head"}
    llama = tiny_models.llama(tie_word_embeddings=False)
    assert found(llama, norms=True) == expected
    assert found(llama, norms=False) == {
        layers.format(i, "mlp.up_proj"): {layers.format(i, "mlp.down_proj")} for i in range(2)
    }
    expected.pop("model.norm")  # the weight of lm_head is that of the embeddings
    assert found(tiny_models.llama(tie_word_embeddings=True), norms=True) == expected


def test_nothing_where_residuals_read_the_norm_or_gelu_lies_between() -> None:
    bert = tiny_models.bert()
    assert found(bert, norms=True) == found(bert, norms=False) == {}


@pytest.mark.parametrize("name", ["gemma2", "llama", "gpt2", "t5", "modernbert", "albert", "opt", "mixtral", "vit"])
def test_any_positive_factors_keep_the_function(name: str) -> None:
    model = tiny_models.ZOO[name]().eval()
    inputs = make_example_inputs(model)
    generator = torch.Generator().manual_seed(0)
    finder, undo = FoldFinder(model), Undo()
    before = Snapshot(model)
    with torch.no_grad():
        expected = main_outputs(model(**inputs))[0]
        folds = [fold for norms in (True, False) for fold in finder.find(linears(model), norms=norms)]
        assert folds
        for fold in folds:
            size = fold.readers[0].weight().shape[1]
            fold.apply(torch.rand(size, generator=generator) * 4 + 0.1, undo)
        assert tiny_models.relative_error(expected, main_outputs(model(**inputs))[0]) < 2e-5
        undo.restore()
    before.check()


def test_a_square_is_no_product_with_another_tensor() -> None:
    class Squared(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x

    model = tiny_models.opt()
    assert "model.decoder.layers.0.fc1" in found(model, norms=False)
    for layer in model.model.decoder.layers:
        layer.activation_fn = Squared()
    assert not any("fc1" in name for name in found(model, norms=False))


def test_gemmas_norms_are_left_in_half_precision_and_said() -> None:
    model = tiny_models.ZOO["gemma2"]().to(torch.bfloat16)
    assert found(model, norms=True) == {}
    before = Snapshot(model)
    config: Any = QuantizationConfig(method="ptq", scheme="int8_dynamic", options={"smooth": 0.5})
    with pytest.raises(TargetError, match="smooth: no norm of Gemma2ForCausalLM"):
        calibrate(model, [make_example_inputs(model)], config)
    before.check()


def test_outputs_are_compared() -> None:
    x = torch.randn(3, 4)
    check_unchanged([x, torch.ones(2).long()], [x * (1 + 1e-5), torch.ones(2).long()], "this")
    for other in (x * 1.01, x * torch.nan):
        with pytest.raises(TargetError, match="this changed the outputs"):
            check_unchanged([x], [other], "this")
