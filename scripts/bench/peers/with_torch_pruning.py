"""Torch-Pruning: heads and feed-forward units, found by its dependency graph, chosen by its importances."""

import time
from typing import Any

import torch_pruning
from architectures import Request, architectures_job
from common import HEAD_DIM, Job, Pruned, loss_of, main, prune_job, targets, unlabeled
from torch import nn
from transformers import PreTrainedModel

IMPORTANCE = {
    "magnitude": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2),
    "taylor": torch_pruning.importance.GroupTaylorImportance,
    "taylor, across layers": torch_pruning.importance.GroupTaylorImportance,
}


def prune(job: Job, model: PreTrainedModel) -> Pruned:
    """Prune as its documentation does it for BERT: the same number of heads and units of every layer, or of all.

    Layers whose outputs are the hidden size are left alone; heads are those of queries, keys and values. Across layers
    heads compete with heads, and feed-forward units with feed-forward units.
    """
    heads, units = targets(job.sparsity)
    across = job.variant.endswith("across layers")
    if job.variant.startswith("taylor"):
        for batch in job.calibration():
            loss_of(model, batch).backward()
    example = unlabeled(job.calibration()[0])
    start = time.process_time()
    attention = [layer.attention.self for layer in model.bert.encoder.layer]
    wide = [layer.intermediate.dense for layer in model.bert.encoder.layer]
    ratio = 1 - units / wide[0].out_features
    projections = {each: 12 for self in attention for each in (self.query, self.key, self.value)}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=IMPORTANCE[job.variant](),
        global_pruning=across,
        pruning_ratio=1 - heads / 12,
        pruning_ratio_dict={tuple(wide): ratio} if across else dict.fromkeys(wide, ratio),
        head_pruning_ratio=1 - heads / 12,
        num_heads=projections,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=_hidden(model, [*projections, *wide]),
        output_transform=lambda output: output.logits.sum(),
    )
    pruner.step()
    seconds = time.process_time() - start
    model.zero_grad()
    for each in attention:
        each.num_attention_heads = each.query.out_features // HEAD_DIM
        each.all_head_size = each.query.out_features
    return Pruned(model, seconds)


def _hidden(model: nn.Module, pruned: list[nn.Module]) -> list[nn.Module]:
    """Return the layers whose outputs stay."""
    chosen = {id(each) for each in pruned}
    kinds = (nn.Linear, nn.Embedding, nn.LayerNorm)
    return [each for each in model.modules() if isinstance(each, kinds) and id(each) not in chosen]


def cut(request: Request) -> Any:
    """Remove what is asked for, by the dependency graph alone."""
    model = request.model
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=request.inputs, output_transform=lambda output: request.tensor(output).sum()
    )
    for names, positions in request.outputs():
        layer = model.get_submodule(names[0])
        function = torch_pruning.prune_linear_out_channels
        group = graph.get_pruning_group(layer, function, idxs=positions)
        if not graph.check_pruning_group(group):
            raise ValueError(f"check_pruning_group refuses to prune {names[0]}")
        group.prune()
    request.set_head_counts()
    return model


if __name__ == "__main__":
    main(
        ["torch-pruning"],
        {"prune": lambda job: prune_job(job, prune), "architectures": lambda job: architectures_job(job, cut)},
    )
