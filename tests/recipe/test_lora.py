"""Adapters around the models of every task, and the model without them again."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_compress import ConfigError
from hf_compress.config.lora import LoraSection
from hf_compress.recipe.lora import merged, with_adapters, without_adapters
from hf_compress.recipe.models import Loaded

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 40}
MODELS: dict[str, tuple[str, Any, set[str]]] = {
    "bert answers": (
        "question-answering",
        lambda: BertForQuestionAnswering(BertConfig(**SIZES)),
        {"qa_outputs"},
    ),
    "bert tokens": (
        "token-classification",
        lambda: BertForTokenClassification(BertConfig(**SIZES)),
        {"classifier"},
    ),
    "distilbert": (
        "text-classification",
        lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTILBERT)),
        {"pre_classifier", "classifier"},
    ),
    "electra": (
        "text-classification",
        lambda: ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=16)),
        {"classifier"},
    ),
    "modernbert": (
        "text-classification",
        lambda: ModernBertForSequenceClassification(
            ModernBertConfig(**SIZES, pad_token_id=0, cls_token_id=1, sep_token_id=2, attn_implementation="eager")
        ),
        {"head", "classifier"},
    ),
    "vit": (
        "image-classification",
        lambda: ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=4, **{k: v for k, v in SIZES.items() if k != "vocab_size"})
        ),
        {"classifier"},
    ),
    "gpt2": ("causal-lm", lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40)), set()),
}


@dataclass(frozen=True)
class Run:
    """What ``with_adapters`` needs of a run."""

    student: Loaded
    task: Any


def adapted(name: str, section: LoraSection) -> tuple[Any, Any]:
    """The plain model and the one with adapters around it."""
    task, make, _ = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    return model, with_adapters(Run(Loaded(model, ()), SimpleNamespace(name=task)), section).student.model  # type: ignore[type-var]


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_trained_whole_and_all_else_by_adapters(name) -> None:
    heads = MODELS[name][2]
    _, wrapped = adapted(name, LoraSection(r=2))
    trained = {each for each, parameter in wrapped.named_parameters() if parameter.requires_grad}
    parts = {each.removeprefix("base_model.model.").split(".")[0] for each in trained if "lora_" not in each}
    assert parts == heads
    assert any("lora_" in each for each in trained)
    assert not any("lora_" in each and each.split(".")[2] in heads for each in trained)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("take_off", [merged, without_adapters])
def test_nothing_of_them_is_left(name, take_off) -> None:
    model, wrapped = adapted(name, LoraSection(r=2))
    plain = take_off(wrapped)
    assert type(plain) is type(model)
    shapes = {each: value.shape for each, value in MODELS[name][1]().state_dict().items()}
    assert {each: value.shape for each, value in plain.state_dict().items()} == shapes


def test_layers_that_are_not_there_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"lora: PEFT refuses target_modules=\('nowhere',\): No modules"):
        adapted("electra", LoraSection(target_modules=["nowhere"]))
