"""Tiny models that have learned something, and batches to prune them with."""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_compress import OneShotResult, PruningConfig, prune_oneshot

LENGTH = 8
VOCAB_SIZE = 20

Batch = dict[str, Any]


def batches(num_batches: int, size: int = 8, seed: int = 0, *, padded: bool = True) -> list[Batch]:
    """Token ids whose label is whether the first token is among the later ones; some end in padding."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(num_batches):
        ids = torch.randint(1, VOCAB_SIZE, (size, LENGTH), generator=generator)
        copied = torch.rand(size, generator=generator) < 0.5
        ids[copied, 2] = ids[copied, 0]
        lengths = torch.randint(5, LENGTH + 1, (size, 1), generator=generator) if padded else LENGTH
        mask = (torch.arange(LENGTH) < lengths).long().expand(size, LENGTH)
        ids = ids * mask
        labels = (ids[:, 1:] == ids[:, :1]).any(1).long()
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def for_language(given: Sequence[Batch]) -> list[Batch]:
    """The same texts, each token a label."""
    return [{**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)} for batch in given]


def prune(model: Any, data: Any, config: PruningConfig | None = None, **keywords: Any) -> OneShotResult:
    """Call ``prune_oneshot`` with a config that has other settings, where keywords name some."""
    fields = {field.name for field in dataclasses.fields(PruningConfig)}
    changes = {name: value for name, value in keywords.items() if name in fields}
    others = {name: value for name, value in keywords.items() if name not in fields}
    settings = dataclasses.replace(config, **changes) if config is not None else PruningConfig(**changes)
    return prune_oneshot(model, data, settings, **others)


@functools.cache
def _trained(kind: str) -> PreTrainedModel:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 16, "initializer_range": 0.1}
    torch.manual_seed(0)
    data = batches(40, 32)
    model: PreTrainedModel
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**sizes, num_labels=2))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0))
        data = for_language(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in data * 2:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def trained(kind: str) -> PreTrainedModel:
    """A copy of a small BERT (classifies) or Llama (2 key-value heads, predicts tokens) after 80 steps."""
    return copy.deepcopy(_trained(kind))


@torch.no_grad()
def logits(model: PreTrainedModel, given: Sequence[Batch]) -> Tensor:
    """Logits at all tokens that are no padding, [tokens or examples, classes]."""
    found = []
    for batch in given:
        output = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found.append(output[batch["attention_mask"].bool()] if output.dim() == 3 else output)
    return torch.cat(found)


def logit_error(model: PreTrainedModel, dense: PreTrainedModel, given: Sequence[Batch]) -> float:
    """Squared distance of the logits, relative to the dense model's."""
    wanted = logits(dense, given)
    return float((logits(model, given) - wanted).square().sum() / wanted.square().sum())


class Snapshot:
    """Everything about a model that pruning may not touch."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.modules = self._modules()
        self.gradients = {name: self._gradient(p) for name, p in model.named_parameters()}

    def check(self) -> None:
        """Assert that nothing is different."""
        assert self.changed() == set()
        assert self._modules() == self.modules
        for name, parameter in self.model.named_parameters():
            (required, before), (requires, after) = self.gradients[name], self._gradient(parameter)
            assert requires == required
            assert (after is None) == (before is None)
            assert before is None or torch.equal(after, before)

    def changed(self) -> set[str]:
        """Return the names of tensors with other values, and take them as they are from now on."""
        now = self.model.state_dict()
        names = {name for name, before in self.weights.items() if not torch.equal(now[name], before)}
        self.weights |= {name: now[name].clone() for name in names}
        return names

    def _modules(self) -> dict[str, Any]:
        return {
            name: (type(module), module.training, len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in self.model.named_modules()
        }

    @staticmethod
    def _gradient(parameter: Tensor) -> tuple[bool, Any]:
        return parameter.requires_grad, None if parameter.grad is None else parameter.grad.clone()


def gram_of_inputs(model: PreTrainedModel, name: str, data: list[Any]) -> Tensor:
    """Return X^T X of what reaches a module, padding left out, float64, [inputs, inputs]."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model.eval()(**batch)
            found[-1] = found[-1][batch["attention_mask"].bool()].double()
    handle.remove()
    x = torch.cat(found)
    return x.T @ x
