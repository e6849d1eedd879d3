"""The README's examples of new methods run, are short, and do what any method of the package does."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import hf_compress
from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
    dimension_groups,
    export_quantized,
    extend,
    shrink,
)
from hf_compress.registry import criteria, distillation_losses, op_rules, quantization_methods

README = (Path(hf_compress.__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README.split("## Adding a method")[1].split("\n## ")[0], flags=re.DOTALL)
MAX_LINES = 20


@pytest.fixture
def registered() -> Iterator[dict[str, Any]]:
    """Run all examples, and forget what they register."""
    registries = (criteria, distillation_losses, quantization_methods, op_rules)
    before = [dict(each._entries) for each in registries]
    names: dict[str, Any] = {}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), names)
    yield names
    for each, entries in zip(registries, before, strict=True):
        each._entries.clear()
        each._entries.update(entries)


def test_there_is_an_example_of_each_kind_and_all_are_short() -> None:
    kinds = ("averaged_criterion", "logits_loss", "quantization_methods", "op_rule")
    assert [sum(kind in example for example in EXAMPLES) for kind in kinds] == [1, 1, 1, 1]
    assert [len(example.splitlines()) < MAX_LINES for example in EXAMPLES] == [True] * len(kinds)


def test_what_extensions_need_is_there() -> None:
    assert sorted(extend.__all__) == extend.__all__
    assert [name for name in extend.__all__ if not hasattr(extend, name)] == []


@pytest.mark.parametrize("criterion", ["largest", "gradient_norm"])
def test_a_new_criterion_prunes(criterion, registered, tiny_bert, classification_data, make_trainer) -> None:
    model = tiny_bert()
    config = PruningConfig(structures={"ffn": 0.5}, criterion=criterion, end=0.5)
    trainer = make_trainer(model, classification_data(16), [PruningCallback(config)], max_steps=8)
    trainer.train()
    assert shrink(trainer).bert.encoder.layer[0].intermediate.dense.out_features < 48


def test_a_new_criterion_decides(registered, tiny_bert, classification_data, make_trainer) -> None:
    model = tiny_bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight[:7] = 50.0
    config = PruningConfig(structures={"ffn": 0.75}, criterion="largest", allocation="per_layer", schedule="one_shot")
    data, callbacks = classification_data(16), [PruningCallback(config)]
    trainer = make_trainer(model, data, callbacks, max_steps=4, learning_rate=1e-6)
    trainer.train()
    small = shrink(trainer).bert.encoder.layer[0].intermediate.dense.weight
    assert len(small) == 12
    assert bool((small[:7].abs() > 40).all())


def test_new_losses_distil(registered, tiny_bert, classification_data, make_trainer) -> None:
    config = DistillationConfig(loss="huber", features=[{"loss": "hidden_l1"}])
    callback = DistillationCallback(config, teacher=tiny_bert(seed=1))
    trainer = make_trainer(tiny_bert(), classification_data(16), [callback], logging_strategy="steps", logging_steps=1)
    trainer.train()
    (first, *_) = trainer.state.log_history
    assert first["logits_loss"] > 0
    assert first["hidden_l1_loss"] > 0


@pytest.mark.parametrize("form", ["dense", "torchao"])
def test_a_new_quantizer_is_trained_and_exported(
    form, registered, tiny_bert, classification_data, make_trainer, tmp_path
) -> None:
    model = tiny_bert()
    callback = QuantizationCallback(QuantizationConfig(scheme="int8_weight_only", method="power_of_two"))
    make_trainer(model, classification_data(16), [callback], max_steps=4).train()
    trained = model.bert.encoder.layer[0].intermediate.dense.weight.detach().clone()
    export_quantized(model, tmp_path / form, format=form)

    largest = trained.abs().amax(dim=1)
    usual, _ = extend.Grid(num_bits=8, symmetric=True).parameters(-largest, largest)
    step = usual.log2().ceil().exp2()[:, None]
    assert not torch.equal(usual[:, None], step)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / form)
    weight = loaded.bert.encoder.layer[0].intermediate.dense.weight
    weight = weight.dequantize() if form == "torchao" else weight
    assert torch.equal(weight, (trained / step).round() * step)


class ScaledRows(nn.Module):
    """A linear layer whose weight is scaled row by row, by an operator that the package does not know."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = dense.weight, dense.bias
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, dense.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, torch.ops.mylib.scale_rows(self.weight, self.scale), self.bias)


@pytest.fixture(scope="module")
def operator() -> None:
    @torch.library.custom_op("mylib::scale_rows", mutates_args=())
    def scale_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale[:, None]

    scale_rows.register_fake(lambda x, scale: torch.empty_like(x))


class ScaledBert(BertForSequenceClassification):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        for layer in self.bert.encoder.layer:
            layer.intermediate.dense = ScaledRows(layer.intermediate.dense)


def model_with_operator() -> ScaledBert:
    torch.manual_seed(0)
    return ScaledBert(tiny_models.bert().config).eval()


def test_an_operator_without_a_rule_freezes_what_it_touches(operator) -> None:
    frozen = [group.frozen for group in dimension_groups(model_with_operator()) if group.kind == "ffn"]
    assert all(reason is not None and "mylib::scale_rows" in reason for reason in frozen)


def test_a_new_rule_frees_it(operator, registered) -> None:
    model = model_with_operator()
    groups = [group for group in dimension_groups(model) if group.kind == "ffn" and group.frozen is None]
    assert len(groups) == len(model.bert.encoder.layer)
    masks = {group.name: torch.arange(group.num_units) % 3 > 0 for group in groups}
    before = model.bert.encoder.layer[0].intermediate.dense.scale.detach().clone()
    small = shrink(model, masks)
    assert torch.equal(small.bert.encoder.layer[0].intermediate.dense.scale, before[masks[groups[0].name]])
