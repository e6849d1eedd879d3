"""Run by ``test_feature_ddp.py`` in two processes; every assertion is made on both ranks."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ddp_trainers import Gradients, trained
from features_by_hand import ALPHA, WEIGHT, config, examples, hidden_mse, models
from torch import Tensor
from transformers import TrainerCallback

from hf_compress import DistillationCallback, DistillationConfig, PruningCallback, PruningConfig
from hf_compress.callbacks.state import read_state
from hf_compress.config import FeatureConfig


def gathered(tensor: Tensor) -> list[Tensor]:
    found = [torch.zeros_like(tensor) for _ in range(2)]
    dist.all_gather(found, tensor.contiguous())
    return found


def check_gradients(kind: str, folder: str) -> None:
    """Two ranks with two micro-batches of two examples are one process with a batch of eight."""
    student, teacher = models(kind)
    data = examples(kind)
    gradients = Gradients()
    callback = DistillationCallback(config("hidden_mse"), teacher)
    trainer = trained(student, data, [callback, gradients], f"{folder}/{kind}")
    plain = Gradients()
    trained(student, data, [plain], f"{folder}/{kind}")

    batch = {name: torch.stack([example[name] for example in data]) for name in data[0]}
    own = student(**batch, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(**batch, output_hidden_states=True)
    keep = batch["attention_mask"].bool()
    layers = list(zip(own.hidden_states[1:], theirs.hidden_states[1:], strict=True))
    values = torch.stack([sum(hidden_mse(a[n][k], b[n][k]) for a, b in layers) / 2 for n, k in enumerate(keep)])
    labels = batch["labels"]
    counts = torch.ones(8) if kind == "bert" else labels[:, 1:].ne(-100).sum(1)
    features = (values * counts).sum() / counts.sum()
    parameters = list(student.parameters())
    task = torch.autograd.grad(own.loss, parameters, retain_graph=True, allow_unused=True)
    total = (1 - ALPHA) * own.loss + ALPHA * WEIGHT * features
    expected = torch.cat([each.flatten() for each in torch.autograd.grad(total, parameters)])
    flat = torch.cat([each.flatten() for each in task if each is not None])
    scale = plain.flat.norm() / flat.norm()
    assert (gradients.flat - scale * expected).norm() < 1e-4 * gradients.flat.norm()
    log = trainer.state.log_history[0]
    mixed = (1 - ALPHA) * log["task_loss"] + ALPHA * log["distillation_loss"]
    assert abs(log["loss"] - mixed) < 1e-3 * log["loss"], log


def check_maps(folder: str) -> None:
    """Projections, masks and models agree; maps are fitted and trained on what all ranks see."""
    student, teacher = models("bert", teacher={"hidden_size": 48}, num_hidden_layers=3)
    features = (
        FeatureConfig(loss="hidden_mse", layers="dynamic", learning_rate=0.01),
        FeatureConfig(loss="attention_kl", layers="dynamic"),
    )
    callback = DistillationCallback(DistillationConfig(features=features), teacher)
    pruning = PruningCallback(PruningConfig(structures={"heads": 0.5, "ffn": 0.5}, begin=1, end=3, update_every=1))
    seen: list[dict[str, Tensor]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.on_step_end()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append({name: each.clone() for name, each in callback._state()[0].items()})

    args = {"max_steps": 5, "save_strategy": "steps", "save_steps": 5, "learning_rate": 1e-3}
    trainer = trained(student, examples("bert"), [callback, pruning, Watch()], folder, **args)
    assert [len(state) for state in seen] == [3, *[12] * 5]
    for state in seen:
        for name, tensor in state.items():
            first, second = gathered(tensor)
            assert torch.equal(first, second), name
    assert not torch.equal(seen[0]["hidden_mse.encoder.0"], seen[-1]["hidden_mse.encoder.0"])
    for mask in pruning.masks().values():
        first, second = gathered(mask.int())
        assert torch.equal(first, second)
    for parameter in trainer.model.parameters():
        first, second = gathered(parameter.detach())
        assert torch.equal(first, second)
    stored = read_state(Path(folder) / "checkpoint-5", 5)["distillation"].tensors
    assert all(torch.equal(stored[name], each) for name, each in seen[-1].items())


def main(folder: str) -> None:
    torch.set_num_threads(1)
    for kind in ("bert", "llama"):
        check_gradients(kind, folder)
    check_maps(f"{folder}/maps")


if __name__ == "__main__":
    main(sys.argv[1])
