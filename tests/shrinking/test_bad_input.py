"""Whatever is asked for: a clear error, and the model of the caller as it was."""

import copy
import inspect

import pytest
import tiny_models
import torch
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel
from zoo import ZOO

from hf_compress import CompressionError, GraphError, ShrinkError, TargetError, dimension_groups, shrink
from hf_compress.shrinking.apply import slice_in_place

FFN = "bert.encoder.layer.0.ffn"


def some_masks() -> dict[str, torch.Tensor]:
    return {FFN: torch.arange(44) > 5}


class OwnConfig(BertConfig):
    model_type = "own_bert"


class OwnModel(PreTrainedModel):
    """What a repository with remote code defines: its own class, with an ``auto_map`` in the config."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.head = nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.bert(input_ids, attention_mask=attention_mask).pooler_output)}


def test_a_class_of_remote_code_shrinks_and_reloads(tmp_path) -> None:
    config = OwnConfig(**tiny_models.ENCODER, auto_map={"AutoModel": "modeling_own.OwnModel"})
    model = tiny_models.randomize(OwnModel(config))
    small = shrink(model, some_masks())
    assert small.config.auto_map == config.auto_map
    small.save_pretrained(tmp_path)
    ids = torch.arange(5, 17).view(2, 6)
    reloaded = OwnModel.from_pretrained(tmp_path)
    assert torch.equal(reloaded(ids)["logits"], small(ids)["logits"])


def test_a_quantized_model_is_refused() -> None:
    model = tiny_models.bert()
    model.config.quantization_config = {"quant_method": "torchao", "quant_type": "int8"}
    with pytest.raises(ShrinkError, match=r"quantized already .*torchao.*Shrink the original checkpoint first"):
        shrink(model, some_masks())


def test_a_model_with_adapters_is_refused() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_models.bert(), peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(ShrinkError, match=r"Merge them first: model = model\.merge_and_unload"):
        shrink(wrapped, some_masks())


def nothing(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bool)


@pytest.mark.parametrize(
    ("name", "kind", "mask", "message"),
    [
        ("t5", "heads", nothing(4), "removes all 4 units"),
        ("bert", "layers", nothing(2), "removes all 2 units"),
        ("mixtral", "experts", nothing(3), "removes all 3 units"),
        ("mixtral", "experts", torch.tensor([True, False, False]), "at least 2 are needed"),
        ("bert", "ffn", torch.ones(43, dtype=torch.bool), r"allowed: torch.bool \(44,\)"),
        ("bert", "ffn", torch.ones(44), "got torch.float32"),
        ("bert", "ffn", torch.ones(44, dtype=torch.bool, device="meta"), "meta device"),
        ("bert", "ffn", [True] * 44, "got list"),
    ],
)
def test_masks_that_cannot_be(name, kind, mask, message) -> None:
    model = ZOO[name]()
    group = next(g for g in dimension_groups(model) if g.kind == kind)
    with pytest.raises(CompressionError, match=message):
        shrink(model, {group.name: mask})


def test_a_layer_that_must_stay() -> None:
    """ModernBERT builds its first layer without a norm: no other can be first."""
    model = ZOO["modernbert"]()
    with pytest.raises(TargetError, match="unit 0 cannot be removed"):
        shrink(model, {"model.layers": torch.tensor([False, True])})


@pytest.mark.parametrize(
    "inputs", [{"input_ids": torch.tensor([[1, 500]])}, {"pixel_values": torch.zeros(1)}, {"input_ids": "text"}]
)
def test_example_inputs_that_do_not_run(inputs) -> None:
    with pytest.raises(GraphError, match="BertForSequenceClassification"):
        shrink(tiny_models.bert(), some_masks(), example_inputs=inputs)


def state(model):
    """Return everything of a model that a caller could notice."""
    return {
        "classes": [type(module) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "config": model.config.to_dict(),
    }


@pytest.mark.parametrize("when", ["before", "halfway", "never"])
def test_the_original_stays_as_it_was(when, monkeypatch) -> None:
    """Weights, gradients, modes, classes, hooks and config, whether or not something fails on the way."""

    def failing(duplicate, plan):
        if when == "halfway":
            slice_in_place(duplicate, plan)
        raise RuntimeError("out of memory")

    if when != "never":
        monkeypatch.setattr(inspect.getmodule(shrink), "slice_in_place", failing)
    model = tiny_models.bert().train()
    model.bert.embeddings.eval()
    model(input_ids=torch.arange(5, 17).view(2, 6)).logits.sum().backward()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    before = copy.deepcopy(state(model))
    if when == "never":
        small = shrink(model, some_masks())
        assert all(parameter.grad is None for parameter in small.parameters())
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            shrink(model, some_masks())
    assert state(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert gradients and all(torch.equal(model.get_parameter(name).grad, g) for name, g in gradients.items())
