"""TextPruner: heads and feed-forward units by the importance that it computes from gradients, or by masks."""

import time
from typing import Any

import torch
from architectures import Request, architectures_job
from common import Job, Pruned, main, prune_job, targets
from textpruner import GeneralConfig, TransformerPruner, TransformerPruningConfig
from transformers import PreTrainedModel


def prune(job: Job, model: PreTrainedModel) -> Pruned:
    """Prune in one iteration, the same number of heads and units of every layer, as it has to be to be saved."""
    heads, units = targets(job.sparsity)
    config = TransformerPruningConfig(
        target_num_of_heads=heads, target_ffn_size=units, pruning_method="iterative", n_iters=1
    )
    general = GeneralConfig(use_device="cpu", output_dir=str(job.folder / "textpruner"))
    pruner = TransformerPruner(model, config, general)
    start = time.process_time()
    pruner.prune(job.calibration(), adaptor=lambda output: output.loss, save_model=False)
    seconds = time.process_time() - start
    model.zero_grad()
    model.config.intermediate_size = units  # as its own ``save_model`` does
    return Pruned(model, seconds, "the time of its cut includes measuring importance")


def cut(request: Request) -> Any:
    """Remove what is asked for, given as masks."""
    model = request.model
    general = GeneralConfig(use_device="cpu", output_dir="textpruner")
    pruner = TransformerPruner(model, TransformerPruningConfig(pruning_method="masks"), general)
    masks = []
    for layouts, unit in ((request.attention, 8), (request.feed_forward, 1)):
        rows = []
        for first, *_ in layouts:
            count = model.get_submodule(first).weight.shape[0] // unit
            rows.append(torch.arange(count) >= count // 2)
        masks.append(torch.stack(rows).float())
    pruner.prune(head_mask=masks[0], ffn_mask=masks[1], save_model=False)
    return model


if __name__ == "__main__":
    main(
        ["textpruner", "numpy"],
        {"prune": lambda job: prune_job(job, prune), "architectures": lambda job: architectures_job(job, cut)},
    )
