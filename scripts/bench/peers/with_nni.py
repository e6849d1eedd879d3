"""NNI 3.0: its pruners choose heads and feed-forward units, its ``ModelSpeedup`` removes them.

Its Trainer integration does not run with this pair of libraries, so that batches come through its ``TorchEvaluator``.
"""

import time
from typing import Any

import nni
import torch
from architectures import ATTENTION, FEED_FORWARD, Request, architectures_job, layouts
from common import HEAD_DIM, Inputs, Job, Pruned, loss_of, main, prune_job, targets, unlabeled
from nni.compression.pruning import L1NormPruner, TaylorPruner
from nni.compression.speedup import ModelSpeedup
from nni.compression.utils import TorchEvaluator
from nni.compression.utils.external.external_replacer import TransformersAttentionReplacer
from torch import Tensor, nn
from transformers import PreTrainedModel

Masks = dict[str, dict[str, Tensor]]


def configs(model: nn.Module, heads: int, units: int) -> list[dict[str, Any]]:
    """Return what its documentation writes for BERT: whole heads, the same of queries, keys and values; and units."""
    found: list[dict[str, Any]] = []
    for i, names in enumerate(layouts(model, ATTENTION)):
        *qkv, _ = names
        width = model.get_submodule(qkv[0]).in_features
        found.append(
            {
                "op_names": qkv,
                "sparse_ratio": 1 - heads / 12 + 1e-6,  # it rounds down
                "granularity": [HEAD_DIM, width],
                "dependency_group_id": f"heads {i}",
            }
        )
    for inner, _ in layouts(model, FEED_FORWARD):
        ratio = 1 - units / model.get_submodule(inner).out_features + 1e-6
        found.append({"op_names": [inner], "sparse_ratio": ratio, "granularity": "out_channel"})
    return found


def choose(job: Job, model: PreTrainedModel, wanted: list[dict[str, Any]]) -> Masks:
    """Return the masks of one of its pruners."""
    if job.variant == "l1":
        pruner = L1NormPruner(model, wanted)
    else:
        batches = job.calibration()

        def passes(model: nn.Module, optimizers: Any, training_step: Any, *args: Any, **kwargs: Any) -> None:
            for batch in batches:
                optimizers.zero_grad()
                training_step(batch, model).backward()
                optimizers.step()

        still = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0)
        evaluator = TorchEvaluator(passes, still, training_step=lambda batch, model: loss_of(model, batch))
        pruner = TaylorPruner(model, wanted, evaluator, training_steps=len(batches))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


def remove(model: PreTrainedModel, masks: Masks, inputs: Inputs) -> PreTrainedModel:
    """Remove what is masked."""
    replacers = [TransformersAttentionReplacer(model)]
    # Positional, in the order of the model's arguments: it takes no other kind here.
    ModelSpeedup(model, dict(inputs), masks, customized_replacers=replacers).speedup_model()
    return model


def prune(job: Job, model: PreTrainedModel) -> Pruned:
    """Prune: the same number of heads and units of every layer."""
    masks = choose(job, model, configs(model, *targets(job.sparsity)))
    model.zero_grad()
    start = time.process_time()
    small = remove(model.eval(), masks, unlabeled(job.calibration()[0]))
    return Pruned(small, time.process_time() - start)


def cut(request: Request) -> Any:
    """Remove what is asked for, given as masks."""
    masks: Masks = {}
    for names, positions in request.outputs():
        for name in names:
            layer = request.model.get_submodule(name)
            rows = torch.arange(layer.weight.shape[0])
            kept = (rows >= len(rows) // 2) if len(names) > 1 else ~torch.isin(rows, torch.tensor(positions))
            masks[name] = {"weight": kept.float()[:, None].expand(layer.weight.shape).clone()}
            if layer.bias is not None:
                masks[name]["bias"] = kept.float()
    return remove(request.model, masks, request.inputs)


if __name__ == "__main__":
    main(
        ["nni", "numpy"],
        {"prune": lambda job: prune_job(job, prune), "architectures": lambda job: architectures_job(job, cut)},
    )
