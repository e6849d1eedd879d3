import pytest
import tiny_models
import torch
from torch import nn
from torch.nn.utils import prune

from hf_compress import GraphError, ShrinkError, dimension_groups, plan_shrink, shrink

MASKS = {"bert.encoder.layer.0.ffn": torch.arange(44) < 20}


def integer_bert():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_models.bert()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def masked_bert():
    model = tiny_models.bert()
    prune.l1_unstructured(model.bert.encoder.layer[0].intermediate.dense, "weight", 0.5)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "bert", "str .* Load one with from_pretrained"),
        (lambda: None, "NoneType .* Load one with from_pretrained"),
        (lambda: nn.DataParallel(tiny_models.bert()), "DataParallel .* Pass model.module"),
        (lambda: torch.compile(tiny_models.bert()), "Pass the model that was given to torch.compile"),
        (masked_bert, "torch.nn.utils.prune masks a weight of 'bert.encoder.layer.0.intermediate.dense'"),
        (integer_bert, "is quantized; floating-point weights are needed. Shrink the original checkpoint first"),
    ],
)
def test_the_plain_model_is_asked_for(make, message) -> None:
    model = make()
    with pytest.raises(GraphError, match=message):
        dimension_groups(model)
    with pytest.raises(GraphError, match=message):
        plan_shrink(model, MASKS)
    with pytest.raises((GraphError, ShrinkError), match="(?i)" + message.split(" .* ")[-1]):
        shrink(model, MASKS)


def test_example_inputs_are_a_dict() -> None:
    with pytest.raises(GraphError, match="got list; allowed: a dict of keyword arguments for Bert"):
        shrink(tiny_models.bert(), MASKS, example_inputs=[1])
