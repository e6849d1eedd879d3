"""Facts of a model that has a signature, a config and parameters, and computes nothing."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_compress.graph.input_facts import ModelFacts


def facts(*arguments: str, parameters: tuple[str, ...] = (), **config: Any) -> ModelFacts:
    """Facts of a model with such arguments of ``forward``; those that end in ``?`` have a default."""

    class Model(nn.Module):
        def forward(self, **given: Any) -> None: ...

    def parameter(name: str) -> inspect.Parameter:
        default = None if name.endswith("?") else inspect.Parameter.empty
        return inspect.Parameter(name.rstrip("?"), inspect.Parameter.KEYWORD_ONLY, default=default)

    Model.forward.__signature__ = inspect.Signature([parameter(name) for name in arguments])  # type: ignore[attr-defined]
    model = Model()
    model.config = PreTrainedConfig()
    vars(model.config).update(config)  # as attributes: some names are of generation, and get lost
    for name in parameters:
        model.register_parameter(name, nn.Parameter(torch.zeros(1)))
    return ModelFacts(model, batch_size=2, length=7, seed=0)
